//! The CPU time of another process, to the nanosecond and in one system call.

use std::io;

/// CPU time of all threads of a process, nanoseconds, those that have ended included.
pub fn process_cpu_ns(pid: u32) -> io::Result<u64> {
    // A dynamic clock id holds the complement of the pid above three bits of type; 2 is "all that the scheduler counted"
    // (include/linux/posix-timers.h: make_process_cpuclock, CPUCLOCK_SCHED).
    let clock = !pid.cast_signed() << 3 | 2;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one `timespec`, which outlives the call.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_this_process_is_that_which_it_sees_itself() {
        let own = || {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: as above.
            unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
            time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
        };
        let before = own();
        let seen = process_cpu_ns(std::process::id()).unwrap();
        assert!(before <= seen && seen <= own());
        assert!(process_cpu_ns(i32::MAX as u32 >> 3).is_err());
    }
}
