"""Inside the context every model is patched, outside none: else the comparison would compare nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import transformers

import lsg_patch
from tests.peer import cases
from tests.peer.every_model import every_model_patched
from tests.peer.test_common_suite import COMMON, HEADS

CLASSES = [head for _, head in HEADS]


@pytest.mark.parametrize(("family", "head"), HEADS, ids=[head.__name__ for head in CLASSES])
def test_every_way_of_building_gives_a_patched_model(
    family: str, head: type[Any], tmp_path: Path
) -> None:
    home = cases.seq2seq if family in cases.seq2seq.FAMILIES else cases.models
    config = home.tiny_config(family)
    with every_model_patched(CLASSES, **COMMON) as patched:
        model = head(copy.deepcopy(config))
        model.save_pretrained(tmp_path)
        built = [
            model,
            head._from_config(copy.deepcopy(config)),
            head.from_pretrained(tmp_path),
            head.from_pretrained(tmp_path, output_loading_info=True)[0],
            transformers.AutoModel.from_pretrained(tmp_path),
        ]
        assert [lsg_patch.is_patched(x) for x in built] == [True] * 5
        assert patched.count == 5
    assert not lsg_patch.is_patched(head(copy.deepcopy(config)))
    assert not lsg_patch.is_patched(head.from_pretrained(tmp_path))


def test_each_family_is_there_with_its_heads() -> None:
    of_family = {family: sum(f == family for f, _ in HEADS) for family in cases.FAMILIES}
    # BART's fifth is the decoder alone, which has no encoder to be patched
    assert all(count >= (4 if family == "bart" else 6) for family, count in of_family.items())
