"""How the code reads, measured; and what breaks the limits of the house.

python .ci/style.py                  # a table of the measures, and what is over a limit
python .ci/style.py nbs/22_fit.ipynb # the same for some files
python .ci/style.py --of FOLDER      # the measures of another package, for comparison
"""

import ast
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 120  # Characters of a line
DENSEST = 40  # Syntax nodes of a line
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
FOREIGN = {"Callable", "Iterable", "Iterator", "Sequence", "Path", "None", "Literal", "Any"}


def code_of(path):
    "Label -> source of every piece of code in a file: the file itself, or the code cells of a notebook"
    if path.suffix != ".ipynb":
        return {path.name: path.read_text(encoding="utf-8")}
    pieces = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%"):
            pieces[f"{path.name} cell {cell['id']}"] = source
    return pieces


def is_exported(source):
    "Whether a cell goes into a module"
    return any(line.startswith("#| export") for line in source.splitlines())


def nodes_by_line(tree):
    "Line -> number of syntax nodes that begin on it; a node without a place counts for its parent"
    counts = {}

    def count(node, line):
        line = getattr(node, "lineno", line)
        counts[line] = counts.get(line, 0) + 1
        for child in ast.iter_child_nodes(node):
            count(child, line)

    for node in tree.body:
        count(node, node.lineno)
    return counts


def nested_comprehensions(tree):
    "Comprehensions that hold another one"
    found = []
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            inner = [other for other in ast.walk(node) if other is not node]
            if any(isinstance(other, COMPREHENSIONS) for other in inner):
                found.append(node)
    return found


def functions(tree):
    "All functions of a tree"
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def parameters_of(function):
    "Its parameters but self and cls, and those that only pass others on"
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def is_own_class(annotation):
    "Whether an annotation names a class of the package, which says what the parameter is"
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    return any(name[0].isupper() and name not in FOREIGN for name in names)


def undocumented(function, lines):
    "Parameters of a long signature that share a line, or that nothing explains"
    parameters = parameters_of(function)
    if len(parameters) <= 2 or function.name.startswith("_"):
        return []
    docstring = ast.get_docstring(function) or ""
    used = [parameter.lineno for parameter in parameters]
    missing = []
    for parameter in parameters:
        explained = "#" in lines[parameter.lineno - 1] or f"`{parameter.arg}`" in docstring
        explained = explained or (
            parameter.annotation is not None and is_own_class(parameter.annotation)
        )
        if not explained or used.count(parameter.lineno) > 1:
            missing.append(parameter.arg)
    return missing


def over_limits(label, source):
    "What is over a limit in one piece of code, a line each"
    tree, lines = ast.parse(source), source.splitlines()
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST:
            yield f"{label}, line {number}: {len(line)} characters: {line.strip()[:60]}"
    for number, count in nodes_by_line(tree).items():
        if count > DENSEST:
            yield f"{label}, line {number}: {count} syntax nodes: {lines[number - 1].strip()[:60]}"
    for node in nested_comprehensions(tree):
        yield f"{label}, line {node.lineno}: a comprehension within a comprehension: name the inner one"
    if is_exported(source):
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        methods = set()
        for node in classes:
            methods.update(functions(node))
        for function in functions(tree):
            inner = function not in methods and function not in tree.body
            missing = [] if inner else undocumented(function, lines)
            if missing:
                yield f"{label}, {function.name}: say what {', '.join(missing)} is, one a line"


def quantiles(values):
    "Median, 90th percentile and largest"
    values = sorted(values) or [0]
    return f"{statistics.median(values):.0f} / {values[int(0.9 * len(values))]} / {values[-1]}"


def measures(sources):
    "Name -> measure, over some pieces of code"
    lengths, nodes, function_lines, nested = [], [], [], 0
    for source in sources:
        tree = ast.parse(source)
        lengths += [
            len(line) for line in source.splitlines() if line.strip() and line.strip()[0] != "#"
        ]
        nodes += nodes_by_line(tree).values()
        function_lines += [
            function.end_lineno - function.lineno + 1 for function in functions(tree)
        ]
        nested += len(nested_comprehensions(tree))
    longer = []
    for limit in (100, 120, 140):
        share = sum(length > limit for length in lengths) / len(lengths)
        longer.append(f"{share:.1%}")
    return {
        "lines of code": len(lengths),
        "line length, median / p90 / max": quantiles(lengths),
        "lines over 100, 120, 140": " / ".join(longer),
        "syntax nodes per line, median / p90 / max": quantiles(nodes),
        "nested comprehensions per 1000 lines": f"{1000 * nested / len(lengths):.1f}",
        "function lines, median / p90 / max": quantiles(function_lines),
    }


def house_files():
    "Notebooks, tests and scripts"
    notebooks = [
        path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
    ]
    return [
        *sorted(notebooks),
        *sorted((ROOT / "tests").glob("*.py")),
        *sorted((ROOT / ".ci").glob("*.py")),
    ]


def main(argv):
    "Print the measures, then what is over a limit"
    if argv[:1] == ["--of"]:
        files = [path for path in sorted(Path(argv[1]).rglob("*.py")) if path.name != "_modidx.py"]
        print(
            "\n".join(
                f"{name:<45}{value}" for name, value in measures(map(Path.read_text, files)).items()
            )
        )
        return
    pieces = {}
    for path in [Path(name).resolve() for name in argv] or house_files():
        pieces |= code_of(path)
    print("\n".join(f"{name:<45}{value}" for name, value in measures(pieces.values()).items()))
    problems = []
    for label, source in pieces.items():
        problems += over_limits(label, source)
    print("\n".join(problems))
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main(sys.argv[1:])
