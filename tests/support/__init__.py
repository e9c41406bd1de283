"""Makers of tiny things and of deployments on this machine, which tests share."""
