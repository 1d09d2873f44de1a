"""Many runs: experiment files, choosing, launching; statistics, tables, figures."""
