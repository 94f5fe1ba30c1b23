"""Known vulnerabilities of the pinned packages, by pip-audit; called by `make lint`.

    python requirements/audit.py requirements/cpu.txt

Exit status 1 where a package has a known vulnerability. What could not be asked about (the advisory service does not
answer, or does not know the package) is said and counted, never taken for a clean result.
"""

import json
import subprocess
import sys

COMMAND = ("-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json")


def main(lock: str) -> int:
    """Audit one lock; prints a line per finding and one in all."""
    done = subprocess.run([sys.executable, *COMMAND, "-r", lock], capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"audit: {lock} NOT audited: {reason}")
        return 0
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    affected = [package for package in packages if package.get("vulns")]
    for package in affected:
        for finding in package["vulns"]:
            mended = ", ".join(finding["fix_versions"]) or "no version yet"
            print(f"audit: {package['name']} {package['version']}: {finding['id']}; mended in {mended}")
    asked = len(packages) - len(skipped)
    print(
        f"audit: {lock}: {asked} of {len(packages)} packages asked about, {len(affected)} with known vulnerabilities"
    )
    if skipped:
        print(
            f"audit: {len(skipped)} NOT audited: the advisory service gave no answer ({', '.join(skipped[:3])} …)"
        )
    return 1 if affected else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
