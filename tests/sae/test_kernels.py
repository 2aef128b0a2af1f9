"""The kernels of the GPU step compile for a GPU, which their interpreter does not tell; it takes none."""

import pytest

triton = pytest.importorskip("triton", minversion="3.4", reason="no Triton here, or one that does not know the form")

#: Argument -> what it points to; all else are float32 tensors, or these whole numbers.
POINTERS = dict.fromkeys(("rounded", "codes", "rows", "decoder", "encoder", "to_output", "bias"), "*bf16")
POINTERS |= {"bits": "*i16", "maxima": "*i16", "chosen": "*i32", "active": "*i32"}
POINTERS |= dict.fromkeys(("indices", "sums", "silent"), "*i64")
NUMBERS = {"n", "d", "k", "batch", "groups", "blocks"}


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("centre", {"ROWS": 8, "D": 32, "K": 8}),
        ("largest", {"SIZE": 4, "GROUPS": 32, "TILE": 32, "K": 8, "BITS": 16, "ABS": False, "RELU": True}),
        ("largest", {"SIZE": 4, "GROUPS": 32, "TILE": 32, "K": 8, "BITS": 16, "ABS": True, "RELU": False}),
        ("explain", {"D": 32, "TILE": 8}),
        ("spread", {"RELU": True, "K": 8}),
        ("parts_of_base", {"ROWS": 16, "TILE": 8, "D": 32}),
        ("update", {"BIASED": True, "D": 32}),
        ("update", {"BIASED": False, "D": 32}),
    ],
)
def test_a_kernel_compiles(name, constants, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vs2_plugin.sae import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    kinds = {arg: POINTERS.get(arg, "i32" if arg in NUMBERS else "*fp32") for arg in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=kinds | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2})
    assert f".entry {name}" in compiled.asm["ptx"] and compiled.asm["cubin"]
