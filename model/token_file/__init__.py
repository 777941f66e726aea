"""The token file (.bin): its manifest, its forms, and how documents are packed into samples."""
