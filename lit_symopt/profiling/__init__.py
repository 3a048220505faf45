"""From a profiler's trace to what each update costs: by role, rule, phase and kernel."""
