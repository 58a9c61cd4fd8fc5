"""A pruned and verified export of a few layers, and pairs of keys."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from export.vllm import export_vllm
from serving.signing.keys import open_signing_key
from serving.signing.sign import sign
from tests.command_line import PLAIN, sentei
from tests.conftest import make_pico
from tests.readers.files import write_tokenizer


@dataclass(frozen=True)
class Pair:
    private: Path
    public: Path


def make_pair(directory: Path, name: str, *, password: bytes | None = None, private=None) -> Pair:
    private = private or ec.generate_private_key(ec.SECP256R1())
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pair = Pair(directory / f"{name}.pem", directory / f"{name}.pub")
    pair.private.touch(mode=0o600)
    pair.private.write_bytes(
        private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    )
    pair.public.write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return pair


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("signing")
    make_pico(home / "model", vocab_size=64, num_hidden_layers=2, head_dim=16)
    write_tokenizer(home / "model")
    (home / "model" / "LICENSE").write_text("Do with it what you want.\n")
    (home / "model" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    (home / "text.txt").write_text("a b c b a c c a b " * 60)
    done = sentei(
        "prune", home / "model", "-o", home / "pruned", "--calibration", home / "text.txt", "--sparsity", "0.3",
        "--samples", "4", "--seq-len", "16", "--align", "8", "--protect", "attention:0", *PLAIN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return home / "pruned"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("keys"), "key")


@pytest.fixture(scope="session")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("other-keys"), "other")


@pytest.fixture(scope="session")
def _exported(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "deploy"
    export_vllm(pruned, out)
    return out


@pytest.fixture(scope="session")
def _signed(_exported: Path, keys: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signed") / "deploy"
    shutil.copytree(_exported, out)
    sign(out, open_signing_key(str(keys.private), lambda: None), force=False)
    return out


@pytest.fixture
def exported(_exported: Path, tmp_path: Path) -> Path:
    """Verified and not signed; a copy that a test may spoil."""
    return shutil.copytree(_exported, tmp_path / "deploy")


@pytest.fixture
def signed(_signed: Path, tmp_path: Path) -> Path:
    """Signed with ``keys``; a copy that a test may spoil."""
    return shutil.copytree(_signed, tmp_path / "deploy")
