"""Quantised models: named and refused, copied as they are if that is allowed; and configs that only say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LLAMA, changed, save_model, state_dict
from test_fit_configs import plan

import merge_engine as me

CONFIGS: dict[str, dict[str, Any]] = {
    "bitsandbytes 4-bit nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq 4-bit": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq 4-bit": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "hqq": {"quant_method": "hqq"},
    "mxfp4": {"quant_method": "mxfp4"},
    "mlx 4-bit": {"group_size": 64, "bits": 4},
    "vptq": {"quant_method": "vptq"},
    "eetq": {"quant_method": "eetq"},
    "aqlm": {"quant_method": "aqlm"},
    "quip 2-bit": {"quant_method": "quip", "bits": 2},
    "exl2 3-bit": {"quant_method": "exl2", "bits": 3},
    "exl3 4-bit": {"quant_method": "exl3", "bits": 4},
    "torchao": {"quant_method": "torchao"},
    "spqr": {"quant_method": "spqr"},
    "marlin 4-bit": {"quant_method": "marlin", "bits": 4},
    "higgs 4-bit": {"quant_method": "higgs", "bits": 4},
    "nvfp4": {"quant_method": "nvfp4"},
}
NOT_NAMED_BY_TENSORS = ("vptq", "eetq", "marlin 4-bit", "higgs 4-bit")


def packed(scheme: str) -> dict[str, torch.Tensor]:
    """The tensors of a tiny Llama, with the projections packed as each format packs them."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict(1).items():
        if "proj" not in name:
            made[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        made |= {key.format(stem): value for key, value in PACKED[scheme].items()}
    return made


SCALES = torch.linspace(1e-5, 1e-3, 8)
INTEGERS = torch.arange(64, dtype=torch.int32).reshape(8, 8)
PACKED: dict[str, dict[str, torch.Tensor]] = {
    "bitsandbytes 4-bit nf4": {
        "{}.weight": torch.zeros(128, 1, dtype=torch.uint8),
        "{}.weight.absmax": SCALES,
        "{}.weight.quant_map": torch.linspace(-1, 1, 16),
        "{}.weight.quant_state.bitsandbytes__nf4": torch.zeros(40, dtype=torch.uint8),
    },
    "bitsandbytes 8-bit": {"{}.weight": INTEGERS.to(torch.int8), "{}.SCB": SCALES},
    "gptq 4-bit": {
        "{}.qweight": INTEGERS,
        "{}.qzeros": INTEGERS,
        "{}.scales": SCALES.half(),
        "{}.g_idx": torch.zeros(8, dtype=torch.int32),
    },
    "awq 4-bit": {"{}.qweight": INTEGERS, "{}.qzeros": INTEGERS, "{}.scales": SCALES.half()},
    "compressed-tensors": {"{}.weight_packed": INTEGERS, "{}.weight_scale": SCALES},
    "fp8": {"{}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "{}.weight_scale_inv": SCALES},
    "hqq": {"{}.W_q": INTEGERS.to(torch.uint8), "{}.scale": SCALES, "{}.zero": SCALES},
    "mxfp4": {"{}_blocks": INTEGERS.to(torch.uint8), "{}_scales": torch.zeros(8, dtype=torch.uint8)},
    "mlx 4-bit": {"{}.weight": INTEGERS.view(torch.uint32), "{}.scales": SCALES, "{}.biases": SCALES},
    "vptq": {"{}.indices": INTEGERS, "{}.centroids": SCALES},
    "eetq": {"{}.weight": INTEGERS.to(torch.int8), "{}.weight_scales": SCALES},
    "aqlm": {"{}.codes": INTEGERS.to(torch.int16), "{}.codebooks": SCALES, "{}.scales": SCALES},
    "quip 2-bit": {"{}.Qidxs": INTEGERS.to(torch.int64), "{}.SU": SCALES, "{}.SV": SCALES},
    "exl2 3-bit": {"{}.q_weight": INTEGERS, "{}.q_scale": INTEGERS, "{}.q_scale_max": SCALES},
    "exl3 4-bit": {"{}.trellis": INTEGERS.to(torch.int16).reshape(1, 1, 64), "{}.suh": SCALES},
    "torchao": {"{}.weight:int_data": INTEGERS.to(torch.int8), "{}.weight:scale": SCALES},
    "spqr": {"{}.dense_weights": INTEGERS.to(torch.int64), "{}.buff0": SCALES},
    "marlin 4-bit": {"{}.B": INTEGERS, "{}.s": SCALES},
    "higgs 4-bit": {"{}.weight": INTEGERS.to(torch.uint8), "{}.tables": SCALES},
    "nvfp4": {"{}.weight": INTEGERS.to(torch.uint8), "{}.weight_scale_2": SCALES[:1]},
}


def save(folder: Path, scheme: str, *, config: bool = True) -> Path:
    key = "quantization" if scheme.startswith("mlx") else "quantization_config"
    settings = changed(LLAMA, **{key: CONFIGS[scheme]}) if config else LLAMA
    return save_model(folder, 1, settings, tensors=packed(scheme))


def passthrough(model: Path, **keys: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}], **keys}


@pytest.mark.parametrize("scheme", CONFIGS)
def test_one_line_names_scheme_and_model(tmp_path: Path, scheme: str) -> None:
    base, tuned = save_model(tmp_path / "base", 0), save(tmp_path / "tuned", scheme)
    with pytest.raises(me.PlanError) as caught:
        plan(base, tuned, allow=["quantization"])
    [line] = caught.value.problems
    assert f"{tuned.name}: quantised ({scheme}), which cannot be merged or rounded; dequantise it" in line


@pytest.mark.parametrize("scheme", CONFIGS)
def test_the_tensors_alone_show_the_scheme(tmp_path: Path, scheme: str) -> None:
    model = save(tmp_path / "model", scheme, config=False)
    named = "weights of integers" if scheme in NOT_NAMED_BY_TENSORS else scheme.split()[0]
    with pytest.raises(me.PlanError, match=rf"quantised \({named}"):
        me.plan(passthrough(model, dtype="float16"))


@pytest.mark.parametrize("scheme", CONFIGS)
def test_a_copy_that_is_allowed_has_the_same_bytes(tmp_path: Path, scheme: str) -> None:
    model = save(tmp_path / "model", scheme)
    with pytest.raises(me.PlanError, match=r"allow: \[quantization\]"):
        me.plan(passthrough(model))
    result = me.run(passthrough(model, allow=["quantization"]), tmp_path / "out")
    assert result.warnings == [
        f"{model}: quantised ({scheme}), so its tensors can only be copied as they are"
    ]
    from safetensors import safe_open

    with (
        safe_open(model / "model.safetensors", "pt") as one,
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as other,
    ):
        assert set(one.keys()) == set(other.keys())
        for name in one.keys():  # noqa: SIM118, it is no mapping
            assert one.get_tensor(name).dtype == other.get_tensor(name).dtype
            assert one.get_tensor(name).view(torch.uint8).equal(other.get_tensor(name).view(torch.uint8))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text()).keys()
        == json.loads((model / "config.json").read_text()).keys()
    )


@pytest.mark.parametrize(
    "keys", [{"dtype": "float16"}, {"out_dtype": "bfloat16"}, {"parameters": {"scale": 2}}]
)
def test_nothing_quantised_is_ever_rounded(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = save(tmp_path / "model", "bitsandbytes 4-bit nf4")
    with pytest.raises(me.PlanError, match="cannot be merged or rounded"):
        me.run(passthrough(model, allow=["quantization"], **keys), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_one_scheme_share_a_line(tmp_path: Path) -> None:
    models = [save(tmp_path / f"m{i}", "gptq 4-bit") for i in range(3)]
    with pytest.raises(me.PlanError) as caught:
        plan(save_model(tmp_path / "base", 0), *models)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
def test_a_stale_key_is_left_out_of_the_output(tmp_path: Path, key: str) -> None:
    config = changed(LLAMA, **{key: CONFIGS["gptq 4-bit"]})
    base, tuned = save_model(tmp_path / "base", 0, config), save_model(tmp_path / "tuned", 1)
    result = me.run(plan(base, tuned), tmp_path / "out")
    assert [line.partition(f"{key} (gptq 4-bit)")[2] for line in result.warnings] == [
        ", but the output is not quantised; left out of its config"
    ]
    assert key not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert plan(tuned, base).warnings == ()  # only the donor's config is carried


def test_a_quantised_donor_that_is_not_merged(tmp_path: Path) -> None:
    donor = save(tmp_path / "donor", "awq 4-bit")
    models = [save_model(tmp_path / f"m{i}", i) for i in range(2)]
    with pytest.raises(me.PlanError, match=r"donor: quantised \(awq 4-bit\)"):
        plan(donor, *models, method="linear")


def test_buffers_of_integers_are_no_quantisation(tmp_path: Path) -> None:
    extra = {
        "model.position_ids": torch.arange(64).reshape(1, 64),
        "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "mask": torch.ones(8, 8, dtype=torch.bool),
        "layers.0.relative_position_index": torch.zeros(512, 512, dtype=torch.int64),
        "layers.0.bn.num_batches_tracked": torch.tensor(7),
        "h.1.attn.bias": torch.ones(1, 1, 512, 512, dtype=torch.uint8),
        "layers.0.mask": torch.ones(512, 512, dtype=torch.bool),
    }
    models = [save_model(tmp_path / f"m{i}", i, tensors=state_dict(i) | extra) for i in range(2)]
    assert plan(*models).warnings == ()
