"""Disassemble a built x86-64 extension: no function may hold an instruction above its file's level.

    python3 tests/c/check_baseline.py .../phi3c/_kernels.abi3.so

What is not named by an instruction set may hold what every x86-64 processor runs: of instructions on vector
registers those of SSE and SSE2, of all others what is not in LATER. Only the files of avx512 may name its
registers. The symbol table says which file a function is from, so the extension must not be stripped. Needs
objdump. Exit status 0 when nothing else is found, and in the files of instruction sets what is looked for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

SSE2 = re.compile(
    r"(?:add|div|max|min|mul|sqrt|sub|cmp\w*)[ps][ds]|(?:rcp|rsqrt)[ps]s|u?comis[ds]|(?:and|andn|or|xor)p[ds]"
    r"|cvt(?:t?p[ds]2(?:dq|pi)|dq2p[ds]|pi2p[ds]|pd2ps|ps2pd|t?s[ds]2si[lq]?|si2s[ds][lq]?|sd2ss|ss2sd)"
    r"|mov(?:[au]p[ds]|dq[au]|[dq]|s[ds]|hlps|lhps|[hl]p[ds]|mskp[ds]|nt(?:dq|p[ds]))|(?:shuf|unpck[hl])p[ds]"
    r"|pack(?:ss(?:wb|dw)|uswb)|p(?:add|sub)(?:[bwdq]|u?s[bw])|p(?:and|andn|or|xor)|pavg[bw]"
    r"|pcmp(?:eq|gt)[bwd]|p(?:extr|insr)w|pmadd(?:wd)|p(?:max|min)(?:sw|ub)|pmovmskb|pmul(?:hu?w|lw|udq)|psadbw"
    r"|pshuf(?:d|hw|lw)|psll(?:[wdq]|dq)|psra[wd]|psrl(?:[wdq]|dq)|punpck[hl](?:bw|wd|dq|qdq)"
)
LATER = re.compile(
    r"v[a-z0-9]+|k(?:mov|and|or|xor|not|test|shift|unpck|add)\w*|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx"
    r"|shlx|shrx|[lt]zcnt\w?|popcnt\w?|crc32\w?|movbe\w?|adcx|adox|fisttp\w*"
)
AVX512_REGISTER = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|[23]\d)")
ISA_FILE = re.compile(r"kernels_(?!scalar)(\w+)\.c")


def files_of_functions(extension: str) -> dict[int, str]:
    """Source file of each local function, by address: the table lists a file, then what is local to it."""
    table = subprocess.run(["objdump", "-t", extension], capture_output=True, text=True, check=True).stdout
    files, file = {}, ""
    for line in table.splitlines():
        if match := re.match(r"\S+ l\s+df \*ABS\*\s+\S+\s*(\S*)$", line):
            file = match[1]
        elif match := re.match(r"(\S+) l\s+F \.text", line):
            files[int(match[1], 16)] = file
    return files


def beyond_baseline(instruction: str) -> bool:
    mnemonic = instruction.split()[0]
    if re.search(r"%[xyz]mm", instruction):
        return SSE2.fullmatch(mnemonic) is None
    return LATER.fullmatch(mnemonic) is not None


def is_above(isa: str | None, instruction: str) -> bool:
    if isa is None:
        return beyond_baseline(instruction)
    return isa != "avx512" and AVX512_REGISTER.search(instruction) is not None


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    files = files_of_functions(sys.argv[1])
    isas = {file: match[1] for file in files.values() if (match := ISA_FILE.fullmatch(file))}
    if not isas:
        sys.exit(f"{sys.argv[1]}: no symbols of kernels_*.c; is it stripped, or not for x86-64?")
    command = ["objdump", "-d", "--no-show-raw-insn", sys.argv[1]]
    disassembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions, beyond, errors = Counter[str](), Counter[str](), []
    function = file = ""
    for line in disassembly.splitlines():
        if match := re.match(r"([0-9a-f]+) <(.+)>:", line):
            function, file = match[2], files.get(int(match[1], 16), "") or "(global)"
        elif match := re.match(r" +[0-9a-f]+:\t(?:(?:rep\w*|lock|bnd|notrack|data16|cs) )*(\S.*)", line):
            instructions[file] += 1
            beyond[file] += beyond_baseline(match[1])
            if is_above(isas.get(file), match[1]):
                errors.append(f"{file}: {function}: {match[1]}")
    for file, n in sorted(instructions.items()):
        print(f"{file:24} {n:6} instructions, {beyond[file]:6} beyond x86-64's baseline")
    errors += [f"{file}: nothing beyond the baseline, where it must be" for file in isas if not beyond[file]]
    for error in errors[:20]:
        print(f"error: {error}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
