"""A fuzzer of everything that quantkit reads: whole samples, damaged by rule, each read or refused in one clean line.

`samples` makes whole files and folders, `damage` breaks them, `readers` says which of them are broken how and who reads
them, `process` does it within limits. A case is a reader's name and a number: equal ones are the same bytes.
"""
