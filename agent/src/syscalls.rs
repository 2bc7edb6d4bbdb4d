//! Names of syscalls and errors.

use syscalls::Sysno;

/// Name of a syscall of the architecture this was built for, or `syscall_<n>`.
pub fn name(number: u64) -> String {
    usize::try_from(number)
        .ok()
        .and_then(Sysno::new)
        .map_or_else(|| format!("syscall_{number}"), |known| known.name().to_owned())
}

/// The error a result stands for.
pub fn errno(result: i64) -> Option<u16> {
    // The kernel's range of error values.
    (-4095..0).contains(&result).then(|| result.unsigned_abs() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_and_unknown_numbers_have_names() {
        assert_eq!(name(libc::SYS_openat as u64), "openat");
        assert_eq!(name(99_999), "syscall_99999");
    }

    #[test]
    fn only_the_kernels_error_range_is_an_error() {
        assert_eq!(errno(-2), Some(2));
        assert_eq!(errno(0), None);
        assert_eq!(errno(-4096), None);
    }
}
