"""What schemes come to on a target, in words; and words that are fit to be shown."""

from typing import TYPE_CHECKING

from qcompiler.config import CompileConfig
from qcompiler.numerics.formats import int_format
from qcompiler.targets import IntegerRules, default_accuracy_level, takes_operators

if TYPE_CHECKING:
    from qcompiler.scheme import Activations, Scheme

__all__ = ["plain_text", "scheme_meaning"]


def scheme_meaning(config: CompileConfig) -> str:
    """What the schemes come to on the target, e.g. ``w4a16 on cpu means groups of 64, asymmetric, exact compute``."""
    plan = config.plan
    parts = [f"{_short(plan.default)} on {config.target} means {_describe(plan.default, config)}"]
    for role, scheme in (("embedding", plan.embedding), ("lm_head", plan.lm_head)):
        parts.append(f"{role} {'float' if scheme is None else scheme.resolve(config.target)}")
    return "; ".join(parts)


def _short(scheme: "Scheme | None") -> str:
    return "float" if scheme is None else str(scheme)


def _describe(scheme: "Scheme | None", config: CompileConfig) -> str:
    if scheme is None:
        return "weights as they are"
    if scheme.sparsity is not None:
        kept = f"all but {scheme.sparsity.kept} of {scheme.sparsity.of}" if scheme.sparsity.of else ""
        zeros = f"{kept or f'{scheme.sparsity.share:.0%}'} of the values zero"
        return ", ".join([zeros, _describe(scheme.dense, config)])
    resolved = scheme.resolve(config.target)
    if resolved.spelled_out and resolved.activations is not None:
        return _describe_activations(resolved, resolved.activations, config)
    words = [f"groups of {resolved.group_size}" if resolved.group_size else "one scale for each output channel"]
    if resolved.vector:
        return ", ".join([*words, _describe_tables(resolved)])
    words.append("symmetric" if resolved.symmetric else "asymmetric")
    container = int_format(resolved.bits).container
    if takes_operators(resolved, config):
        words.append(f"{resolved.bits}-bit codes for operators of our own")
    elif container != resolved.bits:
        words.append(f"{resolved.bits}-bit codes stored in {container} bits")
    if config.output_format == "matmulnbits":
        given = config.accuracy_level
        level = default_accuracy_level(resolved.bits) if given is None else given
        rounded = (level == 4 and config.target == "cpu") or resolved.activations is not None
        words.append("int8 activations inside products" if rounded else "exact compute")
    return ", ".join(words)


def _describe_tables(scheme: "Scheme") -> str:
    """The same for codes that name entries of tables."""
    if scheme.bits == scheme.vector == 1:
        return "signs of weights and activations" if scheme.activations is not None else "signs, exact compute"
    if scheme.known:
        return f"the table {scheme.known.upper()}, exact compute"
    columns = f"{scheme.vector} columns" if scheme.vector > 1 else "a column"
    return f"a table of {1 << scheme.bits * scheme.vector} entries for {columns}, exact compute"


def _describe_activations(scheme: "Scheme", activations: "Activations", config: CompileConfig) -> str:
    """The same for schemes whose activations are quantized in the graph; `scheme` is resolved."""
    owner = f"{scheme.head_size} output channels" if scheme.head_size else "output channel"
    codes = activations.spec(signed=IntegerRules.of(config.target, fp8=activations.fp8).signed)
    when = f"computed for each {activations.granularity} at run time" if activations.dynamic else "static"
    zero = "symmetric" if activations.symmetric else "asymmetric"
    kind = str(codes).removesuffix("-sym") if codes.narrow and not codes.fp8 else codes.dtype.name
    return f"one scale for each {owner}, symmetric, {kind} activations, {when}, {zero}"


def plain_text(text: object) -> str:
    """Text without characters that steer a terminal or the direction of writing."""
    steering = {*range(32), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    return "".join("\N{REPLACEMENT CHARACTER}" if ord(each) in steering else each for each in str(text))
