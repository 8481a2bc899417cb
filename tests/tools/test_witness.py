"""tools/witness on the kernels that there are, and on kernels with one deliberate fault each, which it must find.

Two architectures, the oldest and the newest. `make cuda-check` runs this, after tools/witness has looked at all of them and
at docs/GPU.md: ptxas takes minutes, so it is no part of `make test`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import toolkit
from conftest import required
from tools import pages
from tools.witness import launches, occupancy
from tools.witness.kernels import ARCHITECTURES, CUDA, arch_of, of_ptx, of_source, readable, registers_lacking
from tools.witness.page import PAGE
from tools.witness.ptx import ptx_kernels

SOURCES = sorted(CUDA.rglob("*.cu"))
pytestmark = pytest.mark.exhaustive
OLD, NEW = ARCHITECTURES[0], ARCHITECTURES[-1]


def named(source: Path) -> str:
    return str(source.relative_to(CUDA).with_suffix(""))


def archs(source: Path) -> list[str]:
    """For which the source is looked at: the oldest and the newest, or the one that its room is compiled for."""
    return [a for a in (OLD, NEW) if arch_of(source, a)] or [a for a in ARCHITECTURES if arch_of(source, a)]


def names(kit: toolkit.Toolkit) -> set[str]:
    """Of all kernels."""
    ptx = (kit.ptx(s, arch_of(s, archs(s)[0]) or OLD) for s in SOURCES)
    return {name for path in ptx for name in ptx_kernels(path.read_text())}


@pytest.fixture(autouse=True)
def kit() -> toolkit.Toolkit:
    """nvcc and nvdisasm; where backend cuda is required they are too."""
    found = toolkit.find()
    lacks = "no nvcc" if found is None else "no nvdisasm" if found.tool("nvdisasm") is None else None
    if lacks is None and NEW not in found.known:
        lacks = f"CUDA {found.release} does not know sm_{NEW}"
    if lacks:
        (pytest.fail if "cuda" in required() else pytest.skip)(lacks)
    return found


@pytest.mark.parametrize(("source", "arch"), [pytest.param(s, a, id=f"{named(s)}-{a}") for s in SOURCES for a in archs(s)])
def test_every_kernel_keeps_the_rules(source: Path, arch: str) -> None:
    kernels = of_source(source, arch)
    assert kernels
    assert [f"{k.name}: {d}" for k in kernels for d in k.defects()] == []


# ---- the rules have power


def defects(kit: toolkit.Toolkit, tmp_path: Path, body: str, arch: str = OLD, room: str = ".") -> str:
    """What is said of a kernel of these lines; p and q are float arrays, i is the thread."""
    source = tmp_path / room / "k.cu"
    source.parent.mkdir(exist_ok=True)
    source.write_text(
        f'#include <cuda_fp16.h>\n#include "{"sm90/wgmma" if room == "sm90" else "sm80/mma"}.cuh"\nnamespace rk {{\n'
        f"__global__ void score_kernel(float* p, const float* q, int n) {{ const int i = threadIdx.x; {body} }}\n}}\n"
    )
    (kernel,) = of_source(source, arch)
    return "\n".join(kernel.defects())


@pytest.mark.parametrize("arch", [OLD, NEW])
def test_a_kernel_as_it_should_be_has_no_defects(kit: toolkit.Toolkit, tmp_path: Path, arch: str) -> None:
    """Products, sums, fma, division and square root: all that the contract has."""
    body = "p[i] = fmadd(q[i], q[i + 1], q[i] * q[i + 2] + q[i + 3] / q[i + 4] - sqrtf(q[i + 5]));"
    assert defects(kit, tmp_path, body, arch) == ""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("p[i] = __expf(q[i]);", r"ex2\.approx"),
        ("p[i] = __expf(q[i]);", r"machine code: .*MUFU\.EX2"),
        ("p[i] = __fdividef(q[i], q[i + 1]);", r"div\.approx"),
        ("p[i] = rsqrtf(q[i]);", r"rsqrt\.approx"),
        ("p[i] = __fadd_rz(q[i], q[i + 1]);", r"add\.rz"),
        ("p[i] = float(double(q[i]) * q[i + 1] + q[i + 2]);", r"\.rn\.f64"),
        ("p[i] = __half2float(__hadd(__float2half(q[i]), __float2half(q[i + 1])));", r"add\S*\.f16"),
        ("atomicAdd(p, q[i]);", r"(red|atom)\S*\.add\.f32"),
        ("atomicAdd(p, q[i]);", r"machine code: .*(RED|ATOM)"),
        ("atomicAdd((int*)p, 1);", r"machine code: .*(RED|ATOM)"),
        ("p[i] = float(clock64());", r"%clock64"),
        ('unsigned s; asm("mov.u32 %0, %%smid;" : "=r"(s)); p[i] = float(s);', r"%smid"),
        ("float a[64] = {}; for (int j = 0; j < n; ++j) a[int(q[j]) & 63] = q[j]; p[i] = a[i & 63];", r"bytes of stack"),
        ("float a[64] = {}; for (int j = 0; j < n; ++j) a[int(q[j]) & 63] = q[j]; p[i] = a[i & 63];", r"machine code: .*LDL"),
    ],
)
def test_a_faulty_kernel_is_found(kit: toolkit.Toolkit, tmp_path: Path, body: str, said: str) -> None:
    assert re.search(said, defects(kit, tmp_path, body)), said


@pytest.mark.parametrize("arch", [OLD, NEW])
@pytest.mark.parametrize("body", ["p[i] = q[i] * q[i + 1] + q[i + 2];", "p[i] = q[i] - q[i + 1] * q[i + 2];"])
def test_what_ptxas_fuses_is_found(kit: toolkit.Toolkit, tmp_path: Path, body: str, arch: str) -> None:
    """Without .rn on products and sums ptxas may fuse them, and does; with it, the same PTX has no defect."""
    assert defects(kit, tmp_path, body, arch) == ""
    ptx = kit.ptx(tmp_path / "k.cu", arch).read_text()
    (fused,) = of_ptx(re.sub(r"\b(mul|add|sub)\.rn\.f32\b", r"\1.f32", ptx), "k", arch)
    assert "ptxas fused: 1 x FFMA in the dyed code" in fused.defects()


MMA = "float s[4] = {p[i]}; const unsigned a[4] = {__float_as_uint(q[i])}; mma<f16>(s, a, a[0], a[0]); p[i] = s[0];"


def test_tensor_cores_belong_in_their_room(kit: toolkit.Toolkit, tmp_path: Path) -> None:
    assert defects(kit, tmp_path, MMA, room="sm80") == ""
    assert re.search(r"outside the contract: .*mma\.sync(.|\n)*machine code: .*HMMA", defects(kit, tmp_path, MMA))
    assert "no HMMA" in defects(kit, tmp_path, "p[i] = q[i];", room="sm80")


def test_a_kernels_text_goes_to_its_end(kit: toolkit.Toolkit) -> None:
    """Past the braces of an asm statement, which stand at the beginning of a line, too."""
    ptx = kit.ptx(CUDA / "sm90" / "attention.cu", "90a").read_text()
    texts = ptx_kernels(ptx)
    for what in (".entry ", "wgmma.mma_async", "fma.rn.f32"):
        assert sum(t.count(what) for t in texts.values()) == ptx.count(what) > 0


def test_registers_that_a_block_was_not_started_with_are_a_defect(kit: toolkit.Toolkit) -> None:
    """A block starts with all that its threads may have: with 8 fewer a thread the consumers would wait for ever."""
    seen = 0
    for source in ("linear", "attention"):
        for text in ptx_kernels(kit.ptx(CUDA / "sm90" / f"{source}.cu", "90a").read_text()).values():
            most = 65536 // int(re.findall(r"\.maxntid (\d+)", text)[0]) // 8 * 8
            assert registers_lacking(text, most) is None
            if "setmaxnreg" in text:
                assert f"start with {most - 8} each" in (registers_lacking(text, most - 8) or "")
                seen += 1
    assert seen == 2 * (4 + 2), "float16 and bfloat16, four tiles and two blocks"


def test_what_ptxas_has_to_say_of_wgmma_is_a_defect(kit: toolkit.Toolkit, tmp_path: Path) -> None:
    """Sums that are read before the wait: ptxas lets every wgmma end by itself, and warns. Sums that it knows to be +0: it
    starts from none. The honest kernel has no defect."""
    done, free = "wait_for_wgmma<0>(); hold(s);", "float s[4] = {q[i], q[i], q[i], q[i]};"
    for sums, wait, said in (
        (free, done, ""),
        (free, "", "ptxas waits for every wgmma: C75"),
        ("float s[4] = {};", done, "starts from scale-d = 0"),
    ):
        body = (
            f"using namespace sm90; {sums} hold(s); begin_wgmma(); Columns<8>::multiply<f16>(s, n, n);"
            f"Columns<8>::multiply<f16>(s, n, n); commit_wgmma(); {wait} p[i] = s[0]; p[i + 32] = s[1]; p[i + 64] = q[i];"
        )
        found = defects(kit, tmp_path, body, "90", room="sm90")
        assert said in found if said else found == ""


@pytest.mark.parametrize("what", ["m16n8k8.row.col.f32.f16.f16.f32", "m16n8k4.row.col.f32.tf32.tf32.f32"])
def test_another_matrix_instruction_is_found(kit: toolkit.Toolkit, tmp_path: Path, what: str) -> None:
    """It would add in another order, or cut float32 operands."""
    other = (
        f'asm("mma.sync.aligned.{what} {{%0, %1, %2, %3}}, {{%4, %5}}, {{%6}}, {{%0, %1, %2, %3}};" '
        ': "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) : "r"(a[0]), "r"(a[0]), "r"(a[0]));'
    )
    body = MMA.replace("p[i] = s[0];", f"{other} p[i] = s[0];")
    assert f"mma.sync.aligned.{what}" in defects(kit, tmp_path, body, room="sm80")


def test_compiled_without_its_flag_a_kernel_is_found(kit: toolkit.Toolkit) -> None:
    """--fmad=false is part of the contract: with nvcc's default the PTX itself is another."""
    ptx = kit.ptx(CUDA / "portable" / "softmax.cu", OLD, ["--fmad=true"]).read_text()
    said = [d for k in of_ptx(ptx, "softmax", OLD) for d in k.defects()]
    assert any("outside the contract" in d or "fused" in d for d in said)


def test_narrow_loads_are_found(kit: toolkit.Toolkit) -> None:
    ptx = kit.ptx(CUDA / "portable" / "pooling.cu", OLD).read_text()
    narrow = re.sub(
        r"cp\.async\.cg\.shared\.global \[([^]]*)\], \[([^]]*)\], 16, [^;]*;", r"cp.async.ca.shared.global [\1], [\2], 4;", ptx
    )
    assert narrow != ptx
    said = {k.name.split("<")[0]: k.defects() for k in of_ptx(narrow, "pooling", OLD)}
    assert said["pool_kernel"] == ["streams, but loads no 16 bytes at once"]


# ---- launches, occupancy, the page


def test_every_kernel_is_launched_by_somebody(kit: toolkit.Toolkit) -> None:
    """An instance of a template that no launcher ever starts is dead weight, and untested."""
    there = names(kit)
    _, launched = launches.launches()
    assert sorted(map(readable, there ^ set(launched))) == []
    most = {name: 227 if "sm90" in readable(name) else 99 for name in launched}
    assert all(launch.block <= 1024 and launch.shared <= most[name] * 1024 for name, launch in launched.items())


def test_occupancy_is_the_toolkits(kit: toolkit.Toolkit, tmp_path: Path) -> None:
    """Against cuda_occupancy.h, which NVIDIA's own calculator is made of."""
    header = kit.home / "include" / "cuda_occupancy.h"
    if not header.exists() or shutil.which("c++") is None:
        pytest.skip("no cuda_occupancy.h or no C++ compiler")
    limits = "".join(
        f"if (arch == {a}) "
        f"p.maxThreadsPerMultiprocessor = {32 * limit.warps}, p.sharedMemPerMultiprocessor = {1024 * limit.shared};"
        for a, limit in occupancy.LIMITS.items()
    )
    source = tmp_path / "occupancy.cpp"
    source.write_text(
        f"""#include <stdio.h>
        #include "{header}"
        int main() {{
            int arch, registers, shared, threads;
            while (scanf("%d %d %d %d", &arch, &registers, &shared, &threads) == 4) {{
                cudaOccDeviceProp p;
                p.computeMajor = arch / 10, p.computeMinor = arch % 10, p.maxThreadsPerBlock = 1024, p.warpSize = 32;
                p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.numSms = 1, p.reservedSharedMemPerBlock = 1024;
                p.sharedMemPerBlock = 48 * 1024, p.sharedMemPerBlockOptin = 99 * 1024;
                {limits}
                cudaOccFuncAttributes f;
                f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.sharedSizeBytes = 0;
                f.partitionedGCConfig = PARTITIONED_GC_OFF, f.numBlockBarriers = 1;
                f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, f.maxDynamicSharedSizeBytes = 99 * 1024;
                cudaOccDeviceState s;
                cudaOccResult r;
                if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, threads, shared)) return 1;
                printf("%d\\n", r.activeBlocksPerMultiprocessor);
            }}
        }}"""
    )
    program = tmp_path / "occupancy"
    subprocess.run(["c++", "-w", source, "-o", program], check=True)
    asked = [
        (arch, registers, shared, threads)
        for arch in occupancy.LIMITS
        for registers in (16, 24, 33, 64, 96, 128, 168, 255)
        for shared in (0, 1000, 12288, 30720, 49408, 69632, 99 * 1024)
        for threads in (32, 64, 128, 256, 512)
        if registers * threads <= 65536 // 2 or threads <= 256
    ]
    given = "\n".join(" ".join(map(str, line)) for line in asked)
    said = subprocess.run([program], input=given, capture_output=True, text=True, check=True).stdout.split()
    ours = [occupancy.blocks_per_sm(*line) for line in asked]
    assert [(line, us, int(it)) for line, us, it in zip(asked, ours, said, strict=True) if us != int(it)] == []


def test_the_page_knows_every_kernel(kit: toolkit.Toolkit) -> None:
    generated = pages.text(PAGE, "witness", "tables")
    if f"nvcc {kit.release};" not in generated:
        pytest.skip(f"docs/GPU.md was written with another nvcc than {kit.release}")
    there = {readable(name).split("<")[0] for name in names(kit)}
    assert {n for n in there if f"`{n}`" not in generated} == set(), "run tools/witness --write"
