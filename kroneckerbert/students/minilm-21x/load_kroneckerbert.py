"""Loads the class KroneckerBertConfig from the package kroneckerbert."""

try:
    import kroneckerbert
except ImportError as error:
    raise ImportError(
        "this is a Kronecker-factorised model: pip install 'kron-kernels[bert]', "
        "then import kroneckerbert before loading it"
    ) from error

KroneckerBertConfig = kroneckerbert.KroneckerBertConfig
