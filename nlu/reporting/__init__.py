"""From records to tables, figures and the answers to the paper's claims."""
