"""The .spm bundle: manifest, storage, hashes, signature."""
