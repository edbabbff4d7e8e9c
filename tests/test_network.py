"""Where the Hub does not answer, a command says so once, and waits for nothing."""

import shutil
from types import SimpleNamespace

import pytest
from hub_server import serve
from huggingface_hub import constants
from huggingface_hub.utils import _http

from posttrain.config.schema import HubSource, Tokenizer
from posttrain.errors import UserError
from posttrain.models import network
from posttrain.models.adapters import resolve_adapter
from posttrain.models.chat import load_tokenizer
from posttrain.models.network import look_for_hub
from posttrain.tasks.hub import load_hub

NOBODY = "http://127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """As in a process that was started without HF_HUB_OFFLINE, with an empty cache. Whoever waits fails."""

    def waits(seconds):
        raise AssertionError(f"waited {seconds} s")

    def at(address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(_http, "time", SimpleNamespace(**vars(_http.time) | {"sleep": waits}))
        look_for_hub.cache_clear()

    yield at
    look_for_hub.cache_clear()


def test_a_hub_that_answers_is_asked_for_the_model(hub_at, capsys):
    with serve("token") as hub:
        hub_at(hub.url)
        with pytest.raises(UserError, match="me/none is not on the Hub, or is private"):
            load_tokenizer(Tokenizer(name_or_path="me/none"))
        assert hub.log[0] == "HEAD /" and any("me/none" in line for line in hub.log)
    assert not constants.HF_HUB_OFFLINE and "does not answer" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("load", "told"),
    [
        (lambda: load_tokenizer(Tokenizer(name_or_path="me/none")), "me/none could not be loaded: no copy in the local cache"),
        (lambda: resolve_adapter("me/none"), "adapter me/none is neither a local folder nor reachable"),
        (lambda: load_hub(HubSource(kind="hub", repo_id="me/none", revision="a" * 40)), "me/none could not be read from the Hub"),
    ],
)
def test_a_hub_that_does_not_is_given_up_without_waiting(hub_at, capsys, monkeypatch, load, told):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub_at(NOBODY)
    with pytest.raises(UserError, match=told):
        load()
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert capsys.readouterr().err.splitlines()[0] == f"{NOBODY} does not answer: looking in the cache alone"


def test_it_is_asked_once_and_under_offline_mode_not_at_all(hub_at, monkeypatch):
    asked = []
    monkeypatch.setattr(network, "_answers", lambda address: asked.append(address) is None)
    hub_at(NOBODY)
    look_for_hub()
    look_for_hub()
    look_for_hub.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    look_for_hub()
    assert asked == [NOBODY]


def test_a_local_folder_asks_nobody(hub_at, monkeypatch, tiny_model_dir):
    monkeypatch.setattr(network, "_answers", lambda address: pytest.fail("asked"))
    hub_at(NOBODY)
    load_tokenizer(Tokenizer(name_or_path=str(tiny_model_dir)))


def test_a_folder_with_a_config_alone_has_no_tokenizer(tmp_path, tiny_model_dir):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no tokenizer: download the model whole"):
        load_tokenizer(Tokenizer(name_or_path=str(tmp_path)))
