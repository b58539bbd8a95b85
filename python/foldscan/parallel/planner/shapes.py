"""Shapes of models as the planner sees them: blocks, widths, parameters and FLOPs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from foldscan.models import HybridConfig

SCAN_CHUNK = 128  # tokens a chunk of the Mamba-2 scan


@dataclass(frozen=True)
class ModelShape:
    """A stack of blocks, one per letter of ``pattern``: ``M`` Mamba-2, ``*`` attention, ``-`` MLP, ``E`` experts.

    Where mixers (``M``, ``*``) and ``-`` or ``E`` alternate strictly, two letters make a layer, otherwise one does.

    Attributes:
        name: for messages and tables.
        pattern: one letter a block.
        hidden, vocab: H and V. The embedding and the head are counted as two matrices.
        heads, kv_heads, head_dim: of attention.
        window: keys a query sees; None for all before it.
        experts, top_k, ffn: E, K and F of an expert layer.
        shared_ffn: width of the expert that sees every token; 0 for none.
        mlp_ffn: width of ``-``.
        gated_experts, gated_mlp: two up-projections (SwiGLU) or one (squared ReLU).
        mamba_heads, mamba_head_dim, mamba_groups, state, conv: H, P, G, N and W of a Mamba-2 block.

    Raises:
        ValueError: a field that is missing for the letters of the pattern, or impossible.
    """

    name: str
    pattern: str
    hidden: int
    vocab: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 128
    window: int | None = None
    experts: int = 0
    top_k: int = 0
    ffn: int = 0
    shared_ffn: int = 0
    mlp_ffn: int = 0
    gated_experts: bool = True
    gated_mlp: bool = True
    mamba_heads: int = 0
    mamba_head_dim: int = 64
    mamba_groups: int = 1
    state: int = 128
    conv: int = 4

    def __post_init__(self) -> None:
        if not self.pattern or set(self.pattern) - set("M*-E"):
            raise ValueError(f"pattern: got {self.pattern!r}, want one or more of the letters M * - E")
        needed = ["hidden", "vocab"]
        for letter, names in (
            ("*", ["heads", "kv_heads", "head_dim"]),
            ("E", ["experts", "top_k", "ffn"]),
            ("-", ["mlp_ffn"]),
            ("M", ["mamba_heads", "mamba_head_dim", "mamba_groups", "state", "conv"]),
        ):
            needed += names if letter in self.pattern else []
        for name in needed:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, want a positive integer")
        if self.top_k > self.experts:
            raise ValueError(f"top_k: got {self.top_k}, want at most experts = {self.experts}")

    @cached_property
    def blocks_per_layer(self) -> int:
        """2 where a mixer and a feed-forward block alternate from the first letter to the last, otherwise 1."""
        paired = set(self.pattern[::2]) <= set("M*") and set(self.pattern[1::2]) <= set("-E")
        return 2 if paired and len(self.pattern) % 2 == 0 else 1

    @property
    def layers(self) -> int:
        return len(self.pattern) // self.blocks_per_layer

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of the keys, or of the values."""
        return self.kv_heads * self.head_dim

    @property
    def mamba_width(self) -> int:
        """H P, the channels of the scan."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def mamba_projected(self) -> int:
        """2 H P + 2 G N + H, the rows of in_proj: gate, x, B, C and dt."""
        return 2 * self.mamba_width + 2 * self.mamba_groups * self.state + self.mamba_heads

    def stages(self, pp: int) -> tuple[str, ...]:
        """Blocks of every pipeline stage.

        All stages have as many layers, or would have if the embedding and the head counted as a layer each (as
        Megatron-LM can): Qwen3-235B's 94 layers run on 8 stages.

        Raises:
            ValueError: neither divides.
        """
        layers, width = self.layers, self.blocks_per_layer
        if layers % pp == 0:
            ends = [(i + 1) * (layers // pp) for i in range(pp)]
        elif (layers + 2) % pp == 0 and pp < layers + 2:
            ends = [(i + 1) * ((layers + 2) // pp) - 1 for i in range(pp - 1)] + [layers]
        else:
            raise ValueError(
                f"pp: got {pp}, want a divisor of {layers} layers, or of {layers + 2} with embedding and head"
            )
        starts = [0, *ends[:-1]]
        return tuple(self.pattern[width * a : width * b] for a, b in zip(starts, ends))

    def dense_parameters(self, blocks: str) -> int:
        """Matrix parameters of blocks that tensor parallelism divides: all but the routed experts. Routers and norms
        are left out."""
        sizes = {
            "*": 2 * self.hidden * (self.q_width + self.kv_width),
            "M": self.hidden * (self.mamba_projected + self.mamba_width),
            "-": (2 + self.gated_mlp) * self.hidden * self.mlp_ffn,
            "E": (2 + self.gated_experts) * self.hidden * self.shared_ffn,
        }
        return sum(blocks.count(letter) * size for letter, size in sizes.items())

    def expert_parameters(self, blocks: str) -> int:
        """Parameters of the routed experts of blocks."""
        return blocks.count("E") * (2 + self.gated_experts) * self.hidden * self.ffn * self.experts

    @property
    def vocabulary_parameters(self) -> int:
        """Embedding and head."""
        return 2 * self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All matrix parameters."""
        return self.dense_parameters(self.pattern) + self.expert_parameters(self.pattern) + self.vocabulary_parameters

    def mean_keys(self, seq: int) -> float:
        """Keys that a query of causal attention sees, on average over a sequence: S / 2 without a window."""
        if self.window is None or self.window >= seq:
            return seq / 2
        return self.window - self.window**2 / (2 * seq)

    def flop_per_token(self, seq: int) -> float:
        """FLOPs of the forward pass per token, the causal half of attention counted (arXiv:2504.14960's MFU).

        Mamba-2 blocks: projections, convolution and the chunked scan, H P (4 N + Q) + G N Q.
        """
        h, expert_matrices = self.hidden, 2 + self.gated_experts
        groups_state = self.mamba_groups * self.state
        blocks = {
            "*": 4 * h * (self.q_width + self.kv_width) + 4 * self.mean_keys(seq) * self.q_width,
            "M": 2 * h * (self.mamba_projected + self.mamba_width)
            + 2 * self.conv * (self.mamba_width + 2 * groups_state)
            + self.mamba_width * (4 * self.state + SCAN_CHUNK)
            + groups_state * SCAN_CHUNK,
            "-": 2 * (2 + self.gated_mlp) * h * self.mlp_ffn,
            "E": 2 * expert_matrices * h * (self.ffn * self.top_k + self.shared_ffn) + 2 * h * self.experts,
        }
        return sum(self.pattern.count(letter) * flop for letter, flop in blocks.items()) + 2 * h * self.vocab

    @classmethod
    def from_config(cls, config: HybridConfig, name: str = "model") -> ModelShape:
        """The shape of a `foldscan.models.HybridConfig`.

        Raises:
            ValueError: a block that the formulas do not cover.
        """
        if "P" in config.pattern:
            raise ValueError(f"pattern: got {config.pattern!r}; Mamba-2 beside attention (P) is not covered")
        if config.moe_latent_size is not None:
            raise ValueError(f"moe_latent_size: got {config.moe_latent_size}; latent experts are not covered")
        return cls(
            name=name,
            pattern=config.pattern,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.sliding_window,
            experts=config.num_experts,
            top_k=config.experts_per_token,
            ffn=config.moe_intermediate_size,
            shared_ffn=config.shared_expert_intermediate_size,
            mlp_ffn=config.intermediate_size,
            gated_experts=config.moe_activation == "silu",
            gated_mlp=config.mlp_activation == "silu",
            mamba_heads=config.mamba_num_heads,
            mamba_head_dim=config.mamba_head_dim,
            mamba_groups=config.mamba_num_groups,
            state=config.state_size,
            conv=config.conv_kernel,
        )


@cache
def read_data(name: str) -> dict[str, Any]:
    """A YAML file of this package; not to be changed."""
    return yaml.safe_load((resources.files(__package__) / name).read_text(encoding="utf-8"))


@cache
def standard_models() -> dict[str, ModelShape]:
    """The models that the planner knows by name."""
    found = {}
    for name, values in read_data("models.yaml")["models"].items():
        fields = {key: value for key, value in values.items() if key != "layers"}
        fields["pattern"] *= values.get("layers", 1)
        found[name] = ModelShape(name=name, **fields)
    return found


def load_model(source: str | os.PathLike[str]) -> ModelShape:
    """A standard model by name, or the shape of a model on disk.

    Args:
        source: a name of `standard_models`; a YAML or JSON file of a `HybridConfig`, or of a training configuration
            whose ``model`` is one; or a directory with a ``config.json`` that `foldscan.models.load_pretrained` reads.

    Raises:
        ValueError: no such name or file, a model that the formulas do not cover, or a file that is wrong.
    """
    name = str(source)
    if name in standard_models():
        return standard_models()[name]
    missing = read_data("models.yaml")["not_covered"]
    if name in missing:
        raise ValueError(f"model: {name} is not covered: the formulas do not know {missing[name]}")
    path = Path(source)
    if not path.exists():
        known = ", ".join(standard_models())
        raise ValueError(f"model: got {name!r}, want a file, a directory with config.json, or one of {known}")
    return ModelShape.from_config(_read_config(path), path.stem)


def _read_config(path: Path) -> HybridConfig:
    from foldscan.models.config import MODEL_TYPE, read_yaml
    from foldscan.models.files import FormatError, read_json
    from foldscan.models.layouts import LAYOUTS

    file = path / "config.json" if path.is_dir() else path
    values = read_yaml(file) if file.suffix in (".yaml", ".yml") else read_json(file)
    if isinstance(values.get("model"), dict):
        values = {"vocab_size": values.get("tokenizer_vocab"), **values["model"]}
    model_type = values.get("model_type", MODEL_TYPE)
    if model_type not in LAYOUTS:
        raise FormatError(f"{file}: field 'model_type' is {model_type!r}, want one of {', '.join(LAYOUTS)}")
    return LAYOUTS[model_type].read_config(values, file)
