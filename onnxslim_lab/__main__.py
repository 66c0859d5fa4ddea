"""`python -m onnxslim_lab`."""

from onnxslim_lab.cli import main

main()
