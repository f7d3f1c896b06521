"""The settings of a patch: checked once, frozen, and a plain dictionary when asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lsg_patch.attention import Geometry, check_backend, make_geometry
from lsg_patch.attention.geometry import check_bool, check_int
from lsg_patch.attention.sparsity import MOST_ROUNDS, MOST_SEED

MAX_GLOBAL_TOKENS = 512
POSITION_NAMES = ("tile", "interpolate")
# position_period: the length that the model was used at
TRAINED = "trained"
# of a patched model's config: what its checkpoint says of the patch, and in which form
KEY, FORMAT = "lsg_patch", 1


@dataclass(frozen=True)
class LSGConfig:
    """Settings of LSG attention in a model; the names are the reference's config keys.

    Args:
        block_size: tokens a block; up to two blocks everything sees everything.
        sparsity_type: how sparse tokens are chosen: norm, pooling, lsh, stride, block_stride,
            bos_pooling, or none. norm and pooling are best for a small factor (2 to 4), lsh for
            a large one, bos_pooling in general.
        sparse_block_size: sparse tokens seen on each side; 0 or None for none.
        sparsity_factor: tokens per sparse token; divides both block sizes.
        num_global_tokens: trainable tokens, 0 to 512, that see and are seen by all.
        max_position_embeddings: tokens that the patched model can read.
        positions: how a learned position table becomes longer. tile: its rows are repeated, so that
            short inputs keep their positions. interpolate: they are stretched over the new length
            (``modules.position_table.interpolated`` has the formula): order is kept all the way,
            but every input, a short one too, has other positions than before, which is worth some
            training; what the table learns meanwhile is lost when the patch is taken back. In an
            encoder-decoder both tables are treated alike, so ``tile`` is the one for generation
            without training. Computed tables (sinusoids) go on by their formula in either way.
        position_period: how many of the first rows of a learned position table are tiled, in an
            encoder-decoder of both tables; None: all. Rows that were hardly trained are better not
            repeated. Up to so many tokens nothing changes, so at least ``2 * block_size`` keeps short
            inputs as they were (64 with 128, 128 with 256). "trained": the length that the model was
            used at, by the ``max_seq_length`` of what holds it or its tokenizer's
            ``model_max_length``; in the settings of the patched model it is that number.
        mask_first_token: hide the first real token of each row from the others, the first global
            token replacing it. None: what suits the model's family.
        pool_with_global: give the first global token's output as the first real token's. In a decoder
            only where that token is masked: global tokens see none of its tokens.
        adaptive: take any length; False: beyond two blocks, no multiple of the block is an error.
        unpad: run the layers of a batch with padding on its real tokens only: each row by itself, and
            all packed. Padding has the output of the nearest real token. Reads the lengths from the
            device; compiled and traced models run padded. None: in a model that can, for inputs of more
            than two blocks of which this leaves out a tenth or more.
        lsh_num_pre_rounds: rounds of hashing before the last one (lsh only).
        pass_global_tokens_to_decoder: encoder-decoders: let the decoder see the global tokens.
        attention_probs_dropout_prob: None: the model's own.
        global_positional_stride: distance between the positions that initial global tokens take.
        random_global_init: draw initial global tokens from the words' distribution.
        backend: auto, dense, sdpa or flex: see ``lsg_attention``.
        seed: for lsh and random_global_init; None is seed 0. Torch's global state is not used.

    Raises:
        ValueError: a value is out of range or two do not fit; nothing is changed silently.
    """

    block_size: int = 128
    sparsity_type: str = "norm"
    sparse_block_size: int | None = 128
    sparsity_factor: int | None = 2
    num_global_tokens: int = 1
    max_position_embeddings: int = 4096
    positions: str = "tile"
    position_period: int | str | None = None
    mask_first_token: bool | None = None
    pool_with_global: bool = True
    adaptive: bool = True
    unpad: bool | None = None
    lsh_num_pre_rounds: int = 1
    pass_global_tokens_to_decoder: bool = False
    attention_probs_dropout_prob: float | None = None
    global_positional_stride: int = 64
    random_global_init: bool = False
    backend: str = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.sparsity_type is None:
            object.__setattr__(self, "sparsity_type", "none")
        self.geometry()
        check_int("num_global_tokens", self.num_global_tokens, 0, MAX_GLOBAL_TOKENS)
        check_int("max_position_embeddings", self.max_position_embeddings, 1)
        check_int("lsh_num_pre_rounds", self.lsh_num_pre_rounds, 0, MOST_ROUNDS)
        check_int("global_positional_stride", self.global_positional_stride, 1)
        if self.seed is not None:
            check_int("seed", self.seed, 0, MOST_SEED)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_none = field.default is None and value is None
            if field.type.startswith("bool") and not may_be_none:
                check_bool(field.name, value)
        rate = self.attention_probs_dropout_prob
        if rate is not None and not (type(rate) in (int, float) and 0 <= rate < 1):
            raise ValueError(
                f"attention_probs_dropout_prob must be in [0, 1) or None, not {rate!r}"
            )
        if not isinstance(self.positions, str) or self.positions not in POSITION_NAMES:
            raise ValueError(
                f"positions must be one of {', '.join(POSITION_NAMES)}, not {self.positions!r}"
            )
        period = self.position_period
        if period is not None and not (isinstance(period, str) and period == TRAINED):
            check_int(f'position_period (if not None or "{TRAINED}")', period, 1)
        if period is not None and self.positions != "tile":
            raise ValueError(
                f"position_period={period!r} with positions={self.positions!r}, which "
                'repeats no rows: pass positions="tile" or position_period=None'
            )
        check_backend(self.backend)
        if self.mask_first_token and self.num_global_tokens == 0:
            raise ValueError(
                "mask_first_token=True with num_global_tokens=0: no global token replaces the "
                "first token; pass num_global_tokens=1 or mask_first_token=False"
            )
        if self.mask_first_token and not self.pool_with_global:
            raise ValueError(
                "the first token is masked (mask_first_token, by default where inputs begin with "
                "cls or bos) and pool_with_global=False would give nothing in its place; pass "
                "mask_first_token=False or pool_with_global=True"
            )
        if self.unpad and not self.adaptive:
            raise ValueError(
                "unpad=True with adaptive=False: rows that are packed are of any length; pass "
                "adaptive=True or unpad=False"
            )
        if not self.adaptive:
            object.__setattr__(self, "unpad", False)

    def geometry(self) -> Geometry:
        """The shape of the attention that these settings ask for."""
        return make_geometry(
            self.block_size, self.sparse_block_size, self.sparsity_factor, self.sparsity_type
        )

    def with_family_default(self, mask_first_token: bool) -> LSGConfig:
        """These settings with ``mask_first_token=None`` replaced by what suits a family."""
        if self.mask_first_token is not None:
            return self
        # without a global token there is nothing that could replace the first one
        masked = mask_first_token and self.num_global_tokens > 0
        return dataclasses.replace(self, mask_first_token=masked)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary; ``from_dict`` gives an equal config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LSGConfig:
        """From ``to_dict``, or from the config of a reference LSG model; other keys are left out."""
        if not isinstance(values, Mapping):
            raise ValueError(f"settings must be a dictionary, as to_dict gives it, not {values!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


@dataclass(frozen=True)
class SavedPatch:
    """A patch as the config of a model says it, under ``KEY``, and what its weights say.

    ``global_reach`` is the number of positions that the global tokens were spread over, where these
    are rows of a table; ``bos_id`` the token that the first of them was made of; ``rows``
    (n, width) are the global tokens in the checkpoint, of which the first ones are taken.
    """

    config: LSGConfig
    global_reach: int | None = None
    bos_id: int | None = None
    rows: Tensor | None = dataclasses.field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; ``from_dict`` gives an equal one back."""
        more = {"global_reach": self.global_reach, "bos_id": self.bos_id}
        return {"format_version": FORMAT, **self.config.to_dict(), **more}

    @classmethod
    def from_dict(cls, values: object, **changed: Any) -> SavedPatch:
        """From ``to_dict``, with the settings ``changed``.

        Raises:
            ValueError: it is of a newer release, or not what ``to_dict`` gives.
        """
        where = f"the checkpoint's config has {KEY}"
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{where}={values!r}, which must be a dictionary: save the model again"
            )
        rest = dict(values)
        form = rest.pop("format_version", None)
        check_int(f"{where}: format_version", form, 1)
        if form > FORMAT:
            raise ValueError(
                f"{where} of format_version {form}, this lsg_patch reads up to {FORMAT}: "
                "pip install --upgrade lsg-patch"
            )
        more = {name: rest.pop(name, None) for name in ("global_reach", "bos_id")}
        for name, least in (("global_reach", 1), ("bos_id", 0)):
            if more[name] is not None:
                check_int(f"{where}: {name}", more[name], least)
        try:
            LSGConfig(**rest)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} with a wrong setting: {error}. Take it out") from error
        return cls(LSGConfig(**{**rest, **changed}), **more)
