"""How weights become int4: grids, families, the walk over decoder layers, AWQ, GPTQ, bitsandbytes."""
