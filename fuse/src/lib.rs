//! Lazy squashfs reader and FUSE server.
