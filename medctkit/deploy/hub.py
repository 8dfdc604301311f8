"""Model and processor, or the adapter alone, to the Hugging Face Hub, with a card that says what it is."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from medctkit.cohort.hub_repository import HubRepository, token_source
from medctkit.common.templates import filled
from medctkit.deploy.predict import facts_of
from medctkit.lora.adapter import save_adapter
from medctkit.model.base_model import BaseModel
from medctkit.model.ct_clip import CTCLIPModel


def push_to_hub(base: BaseModel, repo_id: str, license: str, private: bool = True, **data: Any) -> str:
    """Upload a CT-CLIP with its processor, or of an adapted one the active adapter alone; returns the page's address.

    transformers' own `model.push_to_hub` writes an empty card, and makes the repository public.

    Args:
        base: what is uploaded.
        repo_id: "name/repository"; made if it is not there, else its files of the same names are replaced.
        license: of the weights, as the hub writes it: "cc-by-nc-sa-4.0" for CT-CLIP's and what was made of them.
        private: whether only you see a repository that is made now.
        **data: more of `huggingface_hub.ModelCardData`; `base_model` for an adapter.

    Raises:
        ValueError: no CT-CLIP; metadata that the hub refuses.
        PermissionError: no token, or one without the right to write.
        OSError: see `HubRepository`.
    """
    adapted = hasattr(base.model, "peft_config")
    plain = base.model.get_base_model() if adapted else base.model
    if not isinstance(plain, CTCLIPModel):
        raise ValueError(f"a {type(plain).__name__} cannot be uploaded by the kit; expected a CTCLIPModel")
    if token_source() is None:
        raise PermissionError("no Hugging Face token on this machine: run `hf auth login` with one of type Write")
    repository, library = HubRepository(repo_id, "model"), "peft" if adapted else "transformers"
    about = {"name": repo_id, "parameters": plain.num_parameters(), "config": plain.preprocess_config}
    text = filled("hub.md", **about, **facts_of(base))
    card = ModelCardData(license=license, library_name=library, tags=["medctkit", "chest-ct"], **data)
    with tempfile.TemporaryDirectory() as folder:
        if adapted:
            save_adapter(base.model, folder, base.model.active_adapter)
        else:
            plain.save_pretrained(folder)
            base.processor.save_pretrained(folder)
        ModelCard(f"---\n{card.to_yaml()}\n---\n\n{text}").save(Path(folder) / "README.md")
        repository.ask(lambda api: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
        repository.ask(lambda api: api.upload_folder(repo_id=repo_id, folder_path=folder), repo_id)
    return repository.page
