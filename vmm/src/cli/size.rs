//! Sizes as people write them: `512M`, `1G`, `4096`.

use thiserror::Error;

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is no size: give a number with K, M, G or nothing, such as 512M")]
pub struct SizeError(String);

/// Bytes of a size.
///
/// # Errors
/// The text is no size, or one above 2^64.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let wrong = || SizeError(text.to_owned());
    let trimmed = text.trim_end_matches("iB").trim_end_matches('B');
    let split = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (digits, unit) = trimmed.split_at(split);
    let shift = match unit {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// A size as people write it, in the largest unit that divides it; above a gigabyte not in K, but in G
/// with a digit.
#[must_use]
pub fn show(bytes: u64) -> String {
    let units = [(30, "G"), (20, "M"), (10, "K")];
    match units.iter().find(|(shift, _)| bytes >= 1 << shift && bytes.is_multiple_of(1 << shift)) {
        Some((shift, unit)) if *shift > 10 || bytes < 1 << 30 => format!("{}{unit}", bytes >> shift),
        _ if bytes >= 1 << 30 => format!("{:.1}G", bytes as f64 / f64::from(1 << 30)),
        _ => format!("{bytes}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("1GiB"), Ok(1 << 30));
        assert_eq!(parse("64k"), Ok(64 << 10));
        for wrong in ["", "M", "1.5G", "-1", "12X", "99999999999T"] {
            assert!(parse(wrong).is_err(), "{wrong} passed");
        }
        let sizes = [3 << 30, 512 << 20, 7, 3 << 10, (3 << 30) + (512 << 20) + 1024];
        assert_eq!(sizes.map(show), ["3G", "512M", "7", "3K", "3.5G"].map(str::to_owned));
    }
}
