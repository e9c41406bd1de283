"""Who takes part, who carries out jobs, and how updates become the next global adapter."""
