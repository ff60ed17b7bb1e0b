"""`python -m leantune_kernels --cflags --libs`: what a compiler needs to build a C program against the kernels."""

from __future__ import annotations

import argparse

import leantune_kernels


def main() -> None:
    here = leantune_kernels.paths()
    parser = argparse.ArgumentParser(prog="python -m leantune_kernels", description=__doc__)
    parser.add_argument("--include", action="store_true", help="the folder of leantune_kernels.h")
    parser.add_argument("--library", action="store_true", help="the path of libleantune_kernels.so")
    parser.add_argument("--cuda-library", action="store_true", help="the path of libleantune_kernels_cuda.so, if built")
    parser.add_argument("--cflags", action="store_true", help="flags to compile with")
    parser.add_argument("--libs", action="store_true", help="flags to link with; the program finds the library later")
    asked = parser.parse_args()
    folder = here.library.parent
    answers = {
        "include": str(here.include),
        "library": str(here.library),
        "cuda_library": str(here.cuda_library or ""),
        "cflags": f"-I{here.include}",
        "libs": f"-L{folder} -Wl,-rpath,{folder} -lleantune_kernels",
    }
    wanted = [answer for name, answer in answers.items() if getattr(asked, name)]
    if not wanted:
        parser.print_help()
    else:
        print(" ".join(wanted))


if __name__ == "__main__":
    main()
