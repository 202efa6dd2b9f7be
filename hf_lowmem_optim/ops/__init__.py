"""Operations on tensors, one file each: contract, checks, the torch version (the specification), and its dispatch.

``triton/`` and ``cpu/`` hold faster versions under the same file names; ``dispatch.py`` says which one serves a call.
"""
