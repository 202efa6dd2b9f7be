"""A folder that ``hf-lowmem-optim run`` puts on ``PYTHONPATH``, for the ``sitecustomize.py`` in it."""
