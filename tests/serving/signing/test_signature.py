"""A directory is served only if it is, byte for byte, what the key's owner signed."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from serving.server.vllm import server as vllm
from serving.signing import signed_files
from serving.signing.keys import open_signing_key
from serving.signing.sign import sign
from tests.command_line import refused, sentei
from tests.serving.signing.conftest import make_pair


@pytest.fixture
def served(monkeypatch):
    """What reached vLLM; nothing is started."""
    found = []
    monkeypatch.setattr(vllm, "serve", lambda directory, options: found.append(directory) or 0)
    return found


@pytest.fixture(params=["verify", "serve"])
def check(request, served):
    """Both ways in which a signature is looked at."""

    def run(directory, public_key):
        if request.param == "verify":
            return sentei("verify", directory, "--signature", public_key)
        done = sentei("serve", directory, "--require-signature", public_key)
        assert served == ([directory] if done.returncode == 0 else [])
        return done

    return run


def failed(done, *parts):
    """One sentence, no traceback, nothing served: the check's exit code."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr and "itself failed" not in done.stderr
    assert done.stderr.count("Error:") == 1
    for part in (*parts, "Do not serve it"):
        assert part in done.stderr.replace("\n", " ")


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def add(path, text="{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def link_instead(path):
    moved = path.parent.parent / path.name
    path.rename(moved)
    path.symlink_to(moved)


def payload_of(directory):
    return json.loads(base64.b64decode(json.loads((directory / "model.sig").read_text())["dsseEnvelope"]["payload"]))


def with_bundle(directory, change):
    path = directory / "model.sig"
    bundle = json.loads(path.read_text())
    change(bundle)
    path.write_text(json.dumps(bundle))


def hide_a_change(directory):
    """Somebody changes a file and writes its new hashes into the signature, as far as they can."""
    flip(directory / "config.json", 5)
    payload = payload_of(directory)
    resources = payload["predicate"]["resources"]
    for each in resources:
        each["digest"] = hashlib.sha256((directory / each["name"]).read_bytes()).hexdigest()
    root = hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()
    payload["subject"][0]["digest"]["sha256"] = root
    text = base64.b64encode(json.dumps(payload).encode()).decode()
    with_bundle(directory, lambda bundle: bundle["dsseEnvelope"].update(payload=text))


CHANGED = {
    "a byte of the weights": (lambda d: flip(d / "model.safetensors"), "model.safetensors changed"),
    "a byte of the config": (lambda d: flip(d / "config.json", 5), "config.json changed"),
    "the verdict": (lambda d: flip(d / "verification.json", 5), "verification.json changed"),
    "the provenance": (lambda d: flip(d / "provenance.json", 5), "provenance.json changed"),
    "the card": (lambda d: add(d / "README.md", "better than ever"), "README.md changed"),
    "a file added": (lambda d: add(d / "adapter_config.json"), "adapter_config.json added"),
    "a hidden file added": (lambda d: add(d / ".env"), ".env added"),
    "a file of git added": (lambda d: add(d / ".git" / "config"), ".git/config added"),
    "a folder added": (lambda d: add(d / "tokenizer" / "tokenizer.json"), "tokenizer/tokenizer.json added"),
    "a second signature": (lambda d: add(d / "model.sig.partial"), "model.sig.partial added"),
    "a file removed": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json missing"),
    "a file renamed": (lambda d: (d / "LICENSE").rename(d / "LICENCE"), "LICENCE added, LICENSE missing"),
    "a change that the payload hides": (hide_a_change, "model.sig is not as its key made it"),
    "no signature in it": (
        lambda d: with_bundle(d, lambda bundle: bundle["dsseEnvelope"].update(signatures=[])),
        "model.sig is not as its key made it",
    ),
    "another form of signature": (
        lambda d: with_bundle(d, lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain")),
        "model.sig is not as its key made it",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_was_changed_is_named_and_not_served(signed, keys, check, name):
    change, sentence = CHANGED[name]
    change(signed)
    failed(check(signed, keys.public), f"{signed} is not what was signed", sentence)


UNREADABLE = {
    "a link added": (lambda d: (d / "more.json").symlink_to("/etc/hostname"), "more.json is a symbolic link"),
    "a link instead": (lambda d: link_instead(d / "config.json"), "config.json is a symbolic link"),
    "a linked folder": (lambda d: (d / "cache").symlink_to("/tmp"), "cache is a symbolic link"),
    "a FIFO": (lambda d: os.mkfifo(d / "pipe"), "pipe is a device, FIFO or socket"),
    "half a signature": (
        lambda d: (d / "model.sig").write_text((d / "model.sig").read_text()[:700]),
        "model.sig is not readable JSON",
    ),
    "half a payload": (
        lambda d: with_bundle(d, lambda b: b["dsseEnvelope"].update(payload=b["dsseEnvelope"]["payload"][:101])),
        "model.sig is damaged",
    ),
    "an empty signature": (lambda d: (d / "model.sig").write_text(""), "model.sig is not readable JSON"),
    "something else": (lambda d: (d / "model.sig").write_text("{}"), "model.sig does not have the fields it should"),
    "no name of a key": (
        lambda d: with_bundle(d, lambda bundle: bundle["verificationMaterial"].pop("publicKey")),
        "model.sig does not have the fields it should",
    ),
    "no signature": (lambda d: (d / "model.sig").unlink(), "is not signed: it has no model.sig"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_checked_is_not_served(signed, keys, check, name):
    change, sentence = UNREADABLE[name]
    change(signed)
    refused(check(signed, keys.public), sentence)


def test_as_signed_it_is_served_wherever_it_is_copied(signed, keys, check, tmp_path):
    moved = shutil.copytree(signed, tmp_path / "elsewhere" / "other-name")
    assert check(moved, keys.public).returncode == 0


def test_the_directory_itself_may_be_a_link(signed, keys, check, tmp_path):
    (tmp_path / "current").symlink_to(signed)
    assert check(tmp_path / "current", keys.public).returncode == 0


def test_another_key(signed, other_keys, check):
    failed(check(signed, other_keys.public), "was signed by another key")


def test_another_key_that_claims_to_be_the_right_one(exported, keys, other_keys, check):
    sign(exported, open_signing_key(str(other_keys.private), lambda: None), force=False)
    claimed = open_signing_key(str(keys.private), lambda: None).sha256
    with_bundle(exported, lambda bundle: bundle["verificationMaterial"]["publicKey"].update(hint=claimed))
    failed(check(exported, keys.public), "model.sig is not as its key made it")


def test_the_signature_of_another_directory(signed, keys, check, tmp_path):
    other = shutil.copytree(signed, tmp_path / "other")
    (other / "LICENSE").write_text("Pay first.")
    sign(other, open_signing_key(str(keys.private), lambda: None), force=True)
    shutil.copyfile(other / "model.sig", signed / "model.sig")
    failed(check(signed, keys.public), "LICENSE", "changed")


def test_a_signature_that_leaves_files_out_does_not_cover_them(exported, keys, check):
    """model-signing's own command line can sign a part of a directory; whoever checks wants all of it."""
    import model_signing

    (exported / "generation_config.json").write_text("{}")
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=["model.sig", "generation_config.json"])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys.private)
    config.set_hashing_config(hashing).sign(exported, exported / "model.sig")
    failed(check(exported, keys.public), "generation_config.json added")


def test_a_folder_that_cannot_be_read_may_hold_anything(signed, keys, check, monkeypatch):
    (signed / "locked").mkdir()
    scandir = os.scandir

    def locked(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(signed_files.os, "scandir", locked)  # root may read everything
    refused(check(signed, keys.public), "locked cannot be read (Permission denied)")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no public key in PEM form"),
        (b"\x00\x01", "is no public key in PEM form"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "is no public key in PEM form"),
        (b"x" * 100_000, "at most 65,536 are read"),
    ],
)
def test_a_key_that_is_none(signed, check, tmp_path, content, sentence):
    (tmp_path / "key.pub").write_bytes(content)
    refused(check(signed, tmp_path / "key.pub"), sentence)


def test_other_keys_that_cannot_check(signed, keys, check, tmp_path):
    refused(check(signed, tmp_path / "none.pub"), "none.pub does not exist")
    refused(check(signed, keys.private), "is a private key, which belongs on the machine that signs")
    for private in (ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 1024)):
        pair = make_pair(tmp_path, "wrong", private=private)
        refused(
            check(signed, pair.public), "is not a key of an elliptic curve that can sign here (P-256, P-384, P-521)"
        )


def test_without_the_library_nothing_is_served(signed, keys, check, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    refused(check(signed, keys.public), "model-signing is not installed", "pip install 'sentei[sign]'")


def test_a_directory_that_is_not_there(keys, check, tmp_path):
    refused(check(tmp_path / "none", keys.public), "none does not exist")


def test_result_for_programs(signed, keys):
    done = sentei("verify", signed, "--signature", keys.public, "--json")
    found = json.loads(done.stdout)
    files = {path.name for path in signed.iterdir()} - {"model.sig"}
    assert found == {"directory": str(signed), "files": len(files), "key_sha256": found["key_sha256"]}
    assert found["key_sha256"] == hashlib.sha256(keys.public.read_bytes()).hexdigest()


def test_anybody_can_check_it_with_model_signing_alone(signed, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", signed, "--signature", signed / "model.sig"]
    done = subprocess.run([*command, "--public_key", keys.public], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
