"""Models and adapters uploaded to an imitation of the hub on loopback, and fetched from it again."""

import logging

import pytest
import torch
from hub_imitation import HubImitation
from huggingface_hub import ModelCard
from tiny import tiny_ct_clip
from transformers import AutoModel, AutoProcessor

from medctkit.deploy.hub import push_to_hub
from medctkit.lora.adapter import add_lora, load_adapter
from medctkit.model.base_model import BaseModel, load_mini_base
from medctkit.model.fingerprint import digests

# huggingface_hub gives httpx a body by its old name
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
REPOSITORY = "someone/ct-clip"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/no/such/token")
    monkeypatch.setattr("medctkit.cohort.hub_repository.WAIT", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubImitation() as hub:
        hub.uploads = tmp_path / "hub"
        hub.uploads.mkdir()
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture
def base():
    return BaseModel(tiny_ct_clip().eval(), load_mini_base().tokenizer)


def test_a_model_is_uploaded_with_processor_and_card_and_no_log_shows_the_token(base, hub, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    page = push_to_hub(base, REPOSITORY, "cc-by-nc-sa-4.0", datasets=["ibrahimhamamci/CT-RATE"])
    there = hub.uploads / REPOSITORY
    assert page == f"{hub.url}/{REPOSITORY}" and hub.made == {REPOSITORY: "private"}
    assert digests(AutoModel.from_pretrained(there)) == digests(base.model)
    assert AutoProcessor.from_pretrained(there).to_dict() == base.processor.to_dict()
    card = ModelCard.load(there / "README.md")
    assert card.data.license == "cc-by-nc-sa-4.0" and card.data.datasets == ["ibrahimhamamci/CT-RATE"]
    assert digests(base.model)[0] in card.text and "not a medical device" in card.text
    assert not hub.storage_saw_token
    assert hub.token not in caplog.text + "".join(capfd.readouterr()) + card.content


def test_of_an_adapted_model_the_adapter_is_uploaded_and_fits_its_base(base, hub):
    adapted = add_lora(base.model, "paper", r=2, init_lora_weights=False)
    push_to_hub(BaseModel(adapted, base.tokenizer), REPOSITORY, "apache-2.0", private=False)
    there = hub.uploads / REPOSITORY
    names = {path.name for path in there.iterdir()}
    assert (
        names == {"README.md", "adapter_config.json", "adapter_model.safetensors"} and hub.made[REPOSITORY] == "public"
    )
    assert digests(load_adapter(tiny_ct_clip(), there)) == digests(adapted)
    assert ModelCard.load(there / "README.md").data.library_name == "peft"


@pytest.mark.parametrize(
    ("token", "license", "error", "says"),
    [
        ("", "mit", PermissionError, "type Write"),
        ("hf_of_someone_else", "mit", OSError, "403; check the token's rights"),
        (None, None, ValueError, "there is no license"),
    ],
)
def test_who_may_not_and_what_the_hub_refuses(base, hub, monkeypatch, token, license, error, says):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error, match=says) as caught:
        push_to_hub(base, REPOSITORY, license)
    assert "hf_" not in str(caught.value)
    with pytest.raises(ValueError, match="Linear cannot be uploaded"):
        push_to_hub(BaseModel(torch.nn.Linear(1, 1), None), REPOSITORY, "mit")
