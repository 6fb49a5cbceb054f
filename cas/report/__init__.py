"""The report: RAG against cartridges at equal token budgets."""
