"""The `keysift` command line, one file for each command.

The file has the command's flags, help and checks. Work that needs the slow imports of torch and transformers is in a
module that the command imports when it runs: `evaluation`, `profiling`, `load.output`, `calibration`, `diagnosis`.
"""
