"""The five Prefect tasks, each a thin shell over one function of fmcore: typed in, typed out."""
