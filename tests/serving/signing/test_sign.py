"""``sentei sign``: only what was verified is signed, all of it or nothing, and nothing tells the key."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from export.decilm import export_nemotron_nas
from export.vllm import export_vllm
from serving.signing import sign as signing
from tests.command_line import refused, sentei
from tests.conftest import make_pico
from tests.serving.signing.conftest import make_pair
from toolchain.cli.commands import sign as command

WRITTEN = {"provenance.json", "bom.cdx.json", "model.sig"}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_everything_is_signed_and_nothing_else_is_touched(exported, keys):
    before = contents(exported)
    done = sentei("sign", exported, "--key", keys.private, "--json")
    assert done.returncode == 0, done.stderr
    after = contents(exported)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == WRITTEN
    found = json.loads(done.stdout)
    assert found["files"] == len(before) + 2
    assert found["licences"] == ["apache-2.0", "LICENSE"]
    assert found["provenance"] == json.loads(after["provenance.json"])
    assert not list(exported.parent.glob("deploy.*"))
    assert sentei("verify", exported, "--signature", keys.public).returncode == 0


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_longer_keys(exported, tmp_path, curve):
    pair = make_pair(tmp_path, "long", private=ec.generate_private_key(curve))
    assert sentei("sign", exported, "--key", pair.private).returncode == 0
    assert sentei("verify", exported, "--signature", pair.public).returncode == 0


def test_the_password_comes_from_the_environment(exported, tmp_path, monkeypatch):
    pair = make_pair(tmp_path, "locked", password="剪定 7".encode())
    refused(sentei("sign", exported, "--key", pair.private), "is encrypted, and there is no password")
    for wrong, sentence in (("", "there is no password"), ("剪定 8", "The password does not open")):
        monkeypatch.setenv("SENTEI_KEY_PASSWORD", wrong)
        refused(sentei("sign", exported, "--key", pair.private), sentence)
    assert not WRITTEN & contents(exported).keys()
    monkeypatch.setenv("SENTEI_KEY_PASSWORD", "剪定 7")
    done = sentei("sign", exported, "--key", pair.private)
    assert done.returncode == 0, done.stderr
    assert "剪定 7" not in done.stdout + done.stderr
    assert sentei("verify", exported, "--signature", pair.public).returncode == 0


def test_or_from_a_prompt_where_somebody_sits(exported, tmp_path, monkeypatch):
    pair = make_pair(tmp_path, "locked", password=b"secret")
    shown = []
    monkeypatch.setattr(command.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(command.typer, "prompt", lambda text, **how: shown.append((text, how)) or "secret")
    done = sentei("sign", exported, "--key", pair.private)
    assert done.returncode == 0, done.stderr
    assert shown == [("Password of the key", {"hide_input": True, "err": True})]


def test_an_open_key_needs_no_password(exported, keys, monkeypatch):
    monkeypatch.setenv("SENTEI_KEY_PASSWORD", "of another key")
    assert sentei("sign", exported, "--key", keys.private).returncode == 0


def test_nothing_holds_the_key_or_its_password(exported, tmp_path, monkeypatch):
    pair = make_pair(tmp_path, "locked", password=b"open sesame")
    monkeypatch.setenv("SENTEI_KEY_PASSWORD", "open sesame")
    done = sentei("sign", exported, "--key", pair.private)
    assert done.returncode == 0, done.stderr
    body = "".join(pair.private.read_text().splitlines()[1:-1])
    for text in (done.stdout, done.stderr, *(content.decode("latin-1") for content in contents(exported).values())):
        assert "sesame" not in text
        assert body[:40] not in text.replace("\n", "") and body[-40:] not in text.replace("\n", "")


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_key_that_others_can_read_is_told(exported, keys, tmp_path, mode, warned):
    key = Path(shutil.copyfile(keys.private, tmp_path / "key.pem"))
    key.chmod(mode)
    done = sentei("sign", exported, "--key", key, "--quiet")
    assert done.returncode == 0
    assert (
        f"WARNING: {key} is open to other users of this machine. Close it: chmod 600 {key}" in done.stderr
    ) == warned


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_key_that_is_none(exported, tmp_path, content):
    (tmp_path / "key.pem").write_bytes(content)
    refused(sentei("sign", exported, "--key", tmp_path / "key.pem"), "key.pem is no private key in PEM form")
    assert not WRITTEN & contents(exported).keys()


def test_other_keys_that_cannot_sign(exported, keys, tmp_path):
    refused(sentei("sign", exported, "--key", tmp_path / "none.pem"), "none.pem does not exist")
    refused(sentei("sign", exported, "--key", keys.public), "is a public key", "Give the private key")
    others = (
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 1024),
        ec.generate_private_key(ec.SECP256K1()),
    )
    for private in others:
        pair = make_pair(tmp_path, "wrong", private=private)
        refused(sentei("sign", exported, "--key", pair.private), "is not a key of an elliptic curve that can sign here")
    assert not WRITTEN & contents(exported).keys()


def test_a_pin_on_the_command_line_is_not_said_again(exported):
    done = sentei("sign", exported, "--key", "pkcs11:token=t;object=o?pin-value=987654")
    refused(done, "The PKCS#11 URI holds the PIN", "pin-source")
    assert "987654" not in done.stderr


@pytest.mark.skipif(find_spec("PyKCS11") is not None, reason="PyKCS11 is installed")
def test_a_token_needs_an_extra(exported):
    done = sentei("sign", exported, "--key", "pkcs11:token=t;object=o?module-path=/none.so")
    refused(done, "PyKCS11 is not installed", "sentei[pkcs11]")
    assert not WRITTEN & contents(exported).keys()


@pytest.mark.parametrize("library", ["model_signing", "cyclonedx.model.bom"])
def test_a_library_that_is_missing(exported, keys, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    refused(sentei("sign", exported, "--key", keys.private), "is not installed", "pip install 'sentei[sign]'")
    assert not WRITTEN & contents(exported).keys()


def test_a_key_in_the_directory_would_be_given_away(exported, keys):
    shutil.copy(keys.private, exported / "key.pem")
    (exported / "pin").write_text("1234")
    token = f"pkcs11:token=t;object=o?module-path=/none.so&pin-source=file:{exported / 'pin'}"
    for key in (exported / "key.pem", token):
        refused(sentei("sign", exported, "--key", key), "lies in the directory that is to be signed")


def failed_check(directory):
    checks = {"differing_tensors": {"passed": False, "value": 1, "limit": 0}}
    edit(directory / "verification.json", checks=checks, passed=False)


LAYER = {"attention": "keep", "intermediate_size": 8}
REFUSED = {
    "no verification": (lambda d: (d / "verification.json").unlink(), 2, "has no verification.json"),
    "a failed one": (failed_check, 1, "failed its verification (differing_tensors), so it is not signed"),
    "one that says it failed": (lambda d: edit(d / "verification.json", passed=False), 1, "failed its verification"),
    "half of one": (lambda d: (d / "verification.json").write_text("{"), 2, "is not readable JSON"),
    "another model's plan": (
        lambda d: edit(d / "plan.json", layers=[{**LAYER, "layer": 0}, {**LAYER, "layer": 1}]),
        2, "plan.json is another model's plan",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), 2, "shard model.safetensors is missing"),
    "half of the weights": (lambda d: (d / "model.safetensors").write_bytes(b"x" * 50), 2, "is corrupt or truncated"),
    "a link": (lambda d: (d / "more").symlink_to(d / "config.json"), 2, "more is a symbolic link"),
    "no model at all": (lambda d: (d / "config.json").unlink(), 2, "has no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_signed(exported, keys, name):
    change, exit_code, sentence = REFUSED[name]
    change(exported)
    before = contents(exported)
    done = sentei("sign", exported, "--key", keys.private)
    assert done.returncode == exit_code, done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr and done.stderr.count("Error:") == 1
    assert contents(exported) == before


def test_a_directory_that_is_not_there(keys, tmp_path):
    refused(sentei("sign", tmp_path / "none", "--key", keys.private), "none does not exist")


def test_a_name_that_is_not_utf8_is_refused(exported, keys):
    Path(f"{exported}/caf\udce9").write_text("")
    refused(sentei("sign", exported, "--key", keys.private), "holds a name that is not UTF-8")


def test_signing_anew_is_asked_for(signed, keys, other_keys):
    before = contents(signed)
    refused(sentei("sign", signed, "--key", other_keys.private), "is signed already", "--force")
    assert contents(signed) == before
    assert sentei("sign", signed, "--key", other_keys.private, "--force").returncode == 0
    assert sentei("verify", signed, "--signature", other_keys.public).returncode == 0
    assert contents(signed).keys() == before.keys()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("state", ["exported", "signed"])
def test_what_fails_leaves_everything_as_it_was(state, error, keys, monkeypatch, request):
    directory = request.getfixturevalue(state)

    def fail(*_given):
        raise error

    monkeypatch.setattr(signing, "write_signature", fail)
    before = contents(directory)
    assert sentei("sign", directory, "--key", keys.private, "--force").returncode in (2, 130)
    assert contents(directory) == before


def test_what_a_killed_signing_left_is_no_part_of_the_model(exported, keys):
    before = contents(exported)
    (exported / "provenance.json").write_text("{}")
    for name in WRITTEN:
        (exported / f"{name}.partial").write_text("half")
    assert sentei("sign", exported, "--key", keys.private).returncode == 0
    assert contents(exported).keys() == before.keys() | WRITTEN
    assert sentei("verify", exported, "--signature", keys.public).returncode == 0


def test_what_changes_meanwhile_is_not_signed(exported, keys, monkeypatch):
    bill = signing.bill_of_materials

    def somebody_else(*given):
        (exported / "config.json").write_text((exported / "config.json").read_text() + "\n")
        return bill(*given)

    monkeypatch.setattr(signing, "bill_of_materials", somebody_else)
    refused(sentei("sign", exported, "--key", keys.private), "config.json changed while it was being signed")
    assert not WRITTEN & contents(exported).keys()


def test_a_verification_would_end_the_signature(signed, pruned, keys):
    before = contents(signed)
    refused(sentei("verify", signed, "--against", pruned), "is signed", "--signature KEY.pub")
    assert contents(signed) == before


def test_verify_takes_one_of_two_things(signed, pruned, keys):
    refused(sentei("verify", signed), "--against MODEL", "--signature KEY.pub")
    for more in (("--against", pruned), ("--offload",), ("--engine", "vllm"), ("--dtype", "bfloat16")):
        refused(sentei("verify", signed, "--signature", keys.public, *more), "--signature looks at files alone")


def test_other_exports_are_signed_too(pruned, keys, tmp_path):
    make_pico(tmp_path / "model", vocab_size=64, num_hidden_layers=2)
    export_vllm(tmp_path / "model", tmp_path / "unpruned")
    export_nemotron_nas(pruned, tmp_path / "nas")
    for name, format in (("unpruned", "vllm"), ("nas", "nemotron-nas")):
        done = sentei("sign", tmp_path / name, "--key", keys.private, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["provenance"]["format"] == format
        assert sentei("verify", tmp_path / name, "--signature", keys.public).returncode == 0
