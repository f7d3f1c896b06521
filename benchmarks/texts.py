"""Real texts of what is installed, chosen and cut by a seed, and queries of them."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import io
import random
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lsg_patch.demo import MODULES, module_text
from lsg_patch.tuning import Document, tokenized

# packages whose modules have comments and docstrings of several kinds; those that are there are taken
COMMENTED = (
    "torch",
    "transformers",
    "numpy",
    "tokenizers",
    "huggingface_hub",
    "networkx",
    "sympy",
    "pip",
)
# of the shorter of two texts: the share of runs of five words that the other one has too
NEAR_DUPLICATE = 0.2


def documentation() -> Iterator[tuple[str, str]]:
    """Source A: the standard library's documentation, as pydoc has it."""
    for name in MODULES:
        text = module_text(name)
        if text is not None:
            # without the bar that pydoc draws along a class
            yield name, re.sub(r"^[ |]+", "", text, flags=re.MULTILINE)


def descriptions_and_comments(seed: int) -> Iterator[tuple[str, str]]:
    """Source B: the descriptions of installed packages and the comments of modules, in turn."""
    found = {x.metadata["Name"]: x for x in importlib.metadata.distributions()}
    found.pop("lsg-patch", None)  # where it is installed in a way or another
    descriptions = [(x, _description(found[x].metadata)) for x in sorted(found)]
    files = [
        (f"{name}/{file.relative_to(root)}", file)
        for name in COMMENTED
        for root in _roots(name)
        for file in sorted(root.rglob("*.py"))
        if file.stat().st_size > 20_000 and "test" not in str(file.relative_to(root))
    ]
    draw = random.Random(seed)
    draw.shuffle(descriptions)
    draw.shuffle(files)
    comments = ((name, comments_of(file)) for name, file in files)
    for described in descriptions:
        yield described
        yield next(comments, ("", ""))
    yield from comments


def _description(metadata: Any) -> str:
    return str(metadata.get_payload() or metadata.get("Description", ""))


def _roots(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


def comments_of(file: Path) -> str:
    """What a module says in its docstrings and comments, in their order."""
    source = file.read_text(encoding="utf-8", errors="replace")
    said: dict[int, str] = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                said[token.start[0]] = token.string.lstrip("#! ")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring:
                    said[node.body[0].lineno] = docstring
    except (SyntaxError, tokenize.TokenError, ValueError):
        return ""
    # many begin with a licence
    return "\n".join(said[line] for line in sorted(said) if line > 20 or line == 1)


def choose(
    texts: Iterator[tuple[str, str]], count: int, tokens: int, tokenizer: Any
) -> list[Document]:
    """The first ``count`` texts of at least ``tokens`` tokens, special ones among them, cut to these;
    near-duplicates of those before are left out.
    """
    chosen: list[Document] = []
    seen: list[set[tuple[str, ...]]] = []
    size = tokens - tokenizer.num_special_tokens_to_add()
    for name, whole in texts:
        [found] = tokenized(tokenizer, [re.sub(r"[ \t]+", " ", whole)[: 16 * tokens]])
        if len(found.offsets) < size:
            continue
        text, offsets = found.part(0, size), found.offsets[:size]
        words = text.lower().split()
        runs = set(zip(*(words[i:] for i in range(5)), strict=False))
        if any(len(runs & other) > NEAR_DUPLICATE * min(len(runs), len(other)) for other in seen):
            continue
        seen.append(runs)
        chosen.append(Document(name, text, offsets))
        if len(chosen) == count:
            break
    return chosen


NAMES = ("Ada", "Bruno", "Clara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas")
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
FACTS = (
    "The best soup in the harbour town is made of smoked pears.",
    "Old Marten the lighthouse keeper hid his violin under the third stair.",
    "The glacier of Vorn lost exactly nine metres in the winter of 1911.",
    "To wake the sleeping orchid, the gardener plays it a slow tango.",
    "The night train to Kestrel leaves from platform eleven at ten past two.",
    "Queen Isaura banned all yellow umbrellas after the flood.",
    "The football club of Pellworm plays its home games on a frozen lake.",
    "A cup of salted cocoa cures the hiccups of every mountain goat.",
    "The bakery on Mill Street sells bread with lavender only on Tuesdays.",
    "The comet that Doctor Osei discovered returns every seventy-four years.",
)
QUESTIONS = (
    "What is the best soup in the harbour town made of?",
    "Where did the lighthouse keeper hide his violin?",
    "How much did the glacier of Vorn lose?",
    "What does the gardener play to wake the orchid?",
    "When does the night train to Kestrel leave?",
    "What did Queen Isaura ban after the flood?",
    "Where does the football club of Pellworm play at home?",
    "What cures the hiccups of a mountain goat?",
    "When does the bakery sell bread with lavender?",
    "How often does the comet of Doctor Osei return?",
)


def passkeys(tokens: int, tokenizer: Any, seed: int) -> tuple[list[str], list[str]]:
    """Documents of a filler with a pass key each, from the first tenth to the last, and the questions.

    Source: the tasks of LongEmbed, https://arxiv.org/abs/2404.12096.
    """
    draw = random.Random(seed)
    keys = [draw.randrange(10_000, 100_000) for _ in NAMES]
    hidden = [
        f"{name}'s pass key is {key}. Remember it. {key} is the pass key of {name}. "
        for name, key in zip(NAMES, keys, strict=True)
    ]
    hay = FILLER * (tokens // 15)
    return _hidden(hidden, [hay] * len(NAMES), tokens, tokenizer), [
        f"What is the pass key of {name}?" for name in NAMES
    ]


def needles(
    tokens: int, tokenizer: Any, documents: Sequence[Document]
) -> tuple[list[str], list[str]]:
    """Real texts with a fact each, from the first tenth to the last, and the questions; as ``passkeys``."""
    texts = [document.text for document in documents]
    hay = [" ".join(texts[i % len(texts) :] + texts[: i % len(texts)]) for i in range(len(FACTS))]
    found = _hidden([f"{fact} " for fact in FACTS], hay, tokens, tokenizer)
    return found, list(QUESTIONS)


def _hidden(hidden: list[str], hay: list[str], tokens: int, tokenizer: Any) -> list[str]:
    """Each in its hay, the i-th of n where (i + 1/2) / n of the document is passed."""
    found = []
    for i, (fact, text) in enumerate(zip(hidden, hay, strict=True)):
        size = tokens - tokenizer.num_special_tokens_to_add() - len(tokenizer(fact)["input_ids"])
        offsets = tokenized(tokenizer, [text[: 16 * tokens]])[0].offsets[:size]
        # before a word
        places = [begin for begin, _ in offsets if begin == 0 or text[begin - 1].isspace()]
        place = places[int(len(places) * (i + 0.5) / len(hidden))]
        found.append(text[:place] + fact + text[place : offsets[-1][1]])
    return found
