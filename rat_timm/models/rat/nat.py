"""Weights of NAT, the Neighborhood Attention Transformer (arXiv 2204.07143), under the names of RAT.

NAT's parts all have a counterpart in a ``rat_nat_*``: overlapping convolutions, neighbourhood attention with a bias for
every relative position, strided convolutions between stages. What a RAT has beside them starts so that it changes
nothing: rotary frequencies of the blocks at zero, and the gates by which groups take at zero.
"""

import re

import torch
from torch import Tensor, nn

LICENSE = """\
Copyright (c) 2022-2023 SHI Lab

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""
"""The terms of the weights that NAT's authors published."""

_FIRST = "patch_embed.proj.0.weight"
_TRANSFORMERS = (
    (r"^nat\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.", ""),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_NAT = (
    (r"^patch_embed\.proj\.", "stem.convs."),
    (r"^patch_embed\.norm\.", "stem.norms.0."),
    (r"^head\.", "head.fc."),
    (r"^levels\.", "stages."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"\.downsample\.reduction\.", ".downsample.sga.strider."),
    (r"\.downsample\.norm\.", ".downsample.sga.norm1."),
)
_OWN = re.compile(r"^stages\.\d+\.(blocks\.\d+\.attn\.rose|downsample\.sga\.(rose|q|kv|proj|temp|mlp|norm2|norm3))\b")
_CONV_BIAS = re.compile(r"^stages\.\d+\.downsample\.sga\.strider\.bias$")


def is_nat(state_dict: dict[str, Tensor]) -> bool:
    """Tells a state dict of NAT, as its authors or the library transformers name its parameters."""
    return _FIRST in state_dict or any(
        name.endswith("embeddings.patch_embeddings.projection.0.weight") for name in state_dict
    )


def from_nat(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns a state dict with our names of NAT's weights, and with ``model``'s own values of what NAT does not have.

    Args:
        state_dict: With the authors' names or those of transformers.
        model: A RAT of NAT's layout.

    Raises:
        ValueError: If queries, keys and values are not all there.
    """
    if _FIRST not in state_dict:
        state_dict = _from_transformers(state_dict)
    renamed = {_of_next_stage(_replace(name, _NAT)): value for name, value in state_dict.items()}
    own = {name: value for name, value in model.state_dict().items() if _OWN.match(name)}
    # NAT's strided convolutions have no bias
    biases = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if _CONV_BIAS.match(name)}
    if not isinstance(model.get_submodule("head.fc"), nn.Linear):
        renamed = {name: value for name, value in renamed.items() if not name.startswith("head.fc.")}
    return {**own, **biases, **renamed}


def _from_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {_replace(name, _TRANSFORMERS): value for name, value in state_dict.items()}
    for name in list(renamed):
        stem, _, kind = name.rpartition(".attn.query.")
        if stem:
            parts = [f"{stem}.attn.{part}.{kind}" for part in ("query", "key", "value")]
            missing = [part for part in parts if part not in renamed]
            if missing:
                raise ValueError(f"checkpoint lacks {missing}")
            renamed[f"{stem}.attn.qkv.{kind}"] = torch.cat([renamed.pop(part) for part in parts])
        block, _, scales = name.rpartition(".")
        if scales == "layer_scale_parameters":
            renamed[f"{block}.gamma1"], renamed[f"{block}.gamma2"] = renamed.pop(name)
    return renamed


def _replace(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _of_next_stage(name: str) -> str:
    """Counts what comes between stages to the coarser of them."""
    return re.sub(r"^stages\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.", name)
