//! Keys on tokens.

