"""The containers, really run by `make test-compose`; skipped where there is no Docker with compose."""
