"Documents of the local tasks: lm-eval calls these functions from the yaml files beside them."

from functools import cache

from datasets import Dataset

from moe_nb.tiny import next_word_items, tiny_text


@cache
def next_word_documents() -> Dataset:
    "Items of `tiny_next_word`, made once for all models that a process scores."
    return Dataset.from_list(next_word_items(tiny_text("heldout")))


def next_word(**_) -> dict[str, Dataset]:
    "Items of `tiny_next_word`."
    return {"test": next_word_documents()}


def heldout(**_) -> dict[str, Dataset]:
    "Documents of `tiny_perplexity`."
    return {"test": Dataset.from_list([{"text": text} for text in tiny_text("heldout")])}
