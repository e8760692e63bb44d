"""Whatever the small files of a model hold, the fit check ends with findings, and each is one printable line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import GENERATION, LLAMA, TOKENIZER, TOKENIZER_CONFIG, save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attacks import within
from test_fit_configs import plan

import merge_engine as me

FILES: dict[str, dict[str, Any]] = {
    "config.json": {
        **LLAMA,
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "quantization": {"bits": 4},
        "rope_parameters": {"rope_theta": 1.0},
        "text_config": {"hidden_size": 1, "eos_token_id": [1]},
    },
    "generation_config.json": GENERATION,
    "tokenizer_config.json": {**TOKENIZER_CONFIG, "chat_template": [{"name": "a", "template": "b"}]},
    "tokenizer.json": TOKENIZER,
    "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "a/b"},
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folders() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        save_model(Path(root) / "base", 0)
        save_model(Path(root) / "tuned", 1)
        yield Path(root)


def changed(draw: st.DrawFn, document: Any) -> Any:
    """The document with something else in one place, at any depth."""
    if isinstance(document, dict) and document and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(document)))
        return {**document, key: changed(draw, document[key])}
    if isinstance(document, list) and document and draw(st.booleans()):
        return [changed(draw, document[0]), *document[1:]]
    return draw(VALUES)


def test_many_settings_take_little_time(folders: Path) -> None:
    file = folders / "tuned" / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps({f"k{i}": i for i in range(300_000)}))
    try:
        with within(30):
            warnings = plan(folders / "base", folders / "tuned").warnings
    finally:
        file.write_text(before)
    assert any("and 299995 more" in line for line in warnings)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_content_ends_with_findings(folders: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FILES)))
    other = data.draw(st.sampled_from(["base", "tuned"]))
    document = data.draw(st.composite(lambda draw: changed(draw, FILES[name]))())
    file = folders / other / name
    before = file.read_text() if file.exists() else None
    file.write_text(json.dumps(document, indent=data.draw(st.sampled_from([2, None]))))
    try:
        lines = list(plan(folders / "base", folders / "tuned").warnings)
    except me.MergeError as error:
        lines = str(error).splitlines()
    finally:
        file.unlink() if before is None else file.write_text(before)
    assert all(line.isprintable() and len(line) < 4000 for line in lines)
