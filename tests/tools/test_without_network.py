"""Import, operators, training, evaluation and prediction ask the network for nothing."""

import os
import subprocess
import sys

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Any question to the network ends the process; what stays on this machine (a socket of the
# operating system between processes) may go on.
WITHOUT_NETWORK = """
import os, runpy, sys
def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") or (
        event == "socket.connect" and isinstance(arguments[1], tuple)
    ):
        os.write(2, f"asked the network: {event} {arguments[1:]}".encode())
        os._exit(99)
sys.addaudithook(refuse)
"""


def run_without_network(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_NETWORK + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def test_the_network_is_noticed():
    result = run_without_network("import socket; socket.create_connection(('127.0.0.1', 9))")
    assert result.returncode == 99
    assert "asked the network: socket." in result.stderr


def test_import_operator_and_training_ask_no_network(tmp_path, digits, tiny):
    result = run_without_network(
        """
import torch, d2_deform
from d2_deform import ops
ops.deform_conv2d(torch.rand(1, 1, 4, 4), torch.zeros(1, 2, 4, 4), torch.rand(1, 1, 1, 1))
sys.path.insert(0, "tools")
sys.argv[0] = "train_net.py"
runpy.run_path("tools/train_net.py", run_name="__main__")
""",
        *("--config-file", "configs/quickstart.yaml", "--num-gpus", "0", *tiny),
        *("OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1"),
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "model_final.pth").exists()
    assert "AP50" in result.stdout + result.stderr  # evaluated, too
