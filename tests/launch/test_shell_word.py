import re
import subprocess

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ttt_jax.launch.shell_word import plain

WORDS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=20)


def replaced(text, variables):
    """What Kubernetes does to the command of a container."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)


@given(WORDS)
@example(
    ["$(HOME)", "$$(HOME)", "it's", "a\nb", "\\n", "é\t", "{}", '"', "#", "$'x'", "-n", "", " ", "\x7f\x1b", "`id`"]
)
def test_a_word_survives_yaml_kubernetes_and_bash(words):
    line = " ".join(map(plain, words))
    assert re.fullmatch("[ -~]*", line)
    manifest = f"command:\n- bash\n- -c\n- |\n  echo;\n  (printf '%s\\0' {line}) && true\n"
    script = replaced(yaml.safe_load(manifest)["command"][2], {"HOME": "pwned"})
    printed = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert printed == b"\n" + "".join(f"{word}\0" for word in words or [""]).encode()
