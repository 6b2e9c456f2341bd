"""A program that serves models with vLLM and prints what they write; test_vllm.py runs it in a process of its own.

Takes one argument, the jobs as JSON: options of `LLM`, prompts as lists of token ids, and how many tokens to write."""

import gc
import json
import sys

from vllm import LLM, SamplingParams


def bytes_of(model):
    "Bytes of the parameters and buffers of a model of vLLM, experts and all; each tensor once"
    tensors = {}
    for tensor in (*model.parameters(), *model.buffers()):
        tensors[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(tensors.values())


def served(options, prompts, tokens):
    "What a model writes after each prompt, and the bytes that it takes on each rank"
    shared = dict(max_model_len=128, enforce_eager=True, max_num_seqs=32, disable_log_stats=True)
    llm = LLM(**shared | options)
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(asked, greedy, use_tqdm=False)
    return dict(
        texts=[list(output.outputs[0].token_ids) for output in outputs],
        bytes=llm.apply_model(bytes_of),
    )


def main():
    "The answer to each job on one line, marked; an error is an answer too"
    for job in json.loads(sys.argv[1]):
        try:
            answer = served(**job)
        except Exception as error:
            answer = dict(error=f"{type(error).__name__}: {error}")
        print("ANSWER", json.dumps(answer), flush=True)
        gc.collect()


if __name__ == "__main__":
    from vllm_run import main  # a worker can import `bytes_of` from there

    main()
