//! Which salp this is: its version, and the commit that it was built from, if the build knew.

/// The version alone, as in `0.1.0`.
pub const NUMBER: &str = env!("CARGO_PKG_VERSION");

/// The commit and its day, as in `8465eac12ab3 2026-11-30`; the first word ends with `-modified` where
/// sources were not as committed. Empty: built from sources that do not say.
pub const COMMIT: &str = env!("SALP_COMMIT");

/// Both, as in `0.1.0 (8465eac12ab3 2026-11-30)`.
pub const TEXT: &str = env!("SALP_VERSION");
