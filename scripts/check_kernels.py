"""Compiles every CUDA kernel as a run on a GPU would, on a machine without one, and refuses register spills.

    python3 -m venv venv && venv/bin/pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvcc-cu12
    venv/bin/python scripts/check_kernels.py
"""
import ctypes
import pathlib
import re
import subprocess
import sys
import tempfile

import nvidia.cuda_nvcc
import nvidia.cuda_nvrtc

kernels = pathlib.Path(__file__).parent.parent / "yuan-model/src/ops/cuda/kernels"
nvrtc = ctypes.CDLL(str(pathlib.Path(nvidia.cuda_nvrtc.__path__[0]) / "lib/libnvrtc.so.12"))
ptxas = pathlib.Path(nvidia.cuda_nvcc.__path__[0]) / "bin/ptxas"


def text(program, size, get):
    count = ctypes.c_size_t()
    size(program, ctypes.byref(count))
    buffer = ctypes.create_string_buffer(count.value)
    get(program, buffer)
    return buffer.value.decode()


def compile(source, options):
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
    if failed:
        sys.exit(text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog))
    return text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)


common, count = (kernels / "common.cuh").read_text(), 0
for file in sorted(kernels.glob("*.cu")):
    flash = file.stem == "flash"
    masks = ["-DCAUSAL=1", "-DCAUSAL=0"] if flash or file.stem == "softmax" else ["-DCAUSAL=1"]
    types = [["-DBF16"]] if flash else [[], ["-DBF16"]]
    types = [t + [mask] for t in types for mask in masks]
    for architecture in ["90a"] if flash else ["80", "90"]:
        for options in [t + [f"-DHEAD_DIM={d}"] for t in types for d in (64, 128, 192, 256)] if flash else types:
            ptx = compile(common + "\n" + file.read_text(), [f"--gpu-architecture=compute_{architecture}", *options])
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as image:
                image.write(ptx)
                image.flush()
                command = [ptxas, "-v", f"-arch=sm_{architecture}", image.name, "-o", "/dev/null"]
                done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{file.name} {options} for sm_{architecture}: {done.stderr}")
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
            if any(spills):
                sys.exit(f"{file.name} {options} for sm_{architecture} spills registers: {done.stderr}")
            count += len(re.findall("Compiling entry function", done.stderr))
print(f"{count} kernels compile, without spills")
