use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::BorrowedFd;

use super::*;

fn rate(per_second: u64, burst: u64) -> Rate {
    Rate {
        per_second: NonZeroU64::new(per_second).unwrap(),
        burst: NonZeroU64::new(burst).unwrap(),
    }
}

#[test]
fn a_full_bucket_gives_its_burst_and_then_its_rate() {
    let start = Instant::now();
    let mut limiter = Limiter::new(Some(rate(10, 3)), None, start);

    for _ in 0..3 {
        assert_eq!(limiter.take(0, start), Ok(()));
    }
    assert_eq!(limiter.take(0, start), Err(Duration::from_millis(100)));
    assert_eq!(limiter.take(0, start + Duration::from_millis(100)), Ok(()));
    assert!(limiter.take(0, start + Duration::from_millis(199)).is_err());
}

#[test]
fn what_is_taken_beyond_the_bucket_is_paid_for_afterwards() {
    let start = Instant::now();
    let mut limiter = Limiter::new(None, Some(rate(100, 10)), start);

    assert_eq!(limiter.take(110, start), Ok(()));
    // 100 in debt, and then one for the next.
    let paid = start + Duration::from_millis(1010);
    assert_eq!(limiter.take(50, start), Err(paid - start));
    assert_eq!(limiter.take(50, paid), Ok(()));
    assert_eq!(limiter.take(50, paid), Err(Duration::from_millis(500)));
}

#[test]
fn what_one_limit_refuses_is_not_taken_from_the_other() {
    let start = Instant::now();
    let mut limiter = Limiter::new(Some(rate(1, 2)), Some(rate(100, 100)), start);

    assert_eq!(limiter.take(100, start), Ok(()));
    assert!(limiter.take(1, start).is_err());
    assert_eq!(limiter.take(0, start), Ok(()), "the second operation is still there");
}

#[test]
fn the_timer_becomes_readable_when_it_is_worth_another_try() {
    let mut throttle = Throttle::new(Some(rate(100, 1)), None).unwrap();
    assert!(throttle.admit(0).unwrap());
    assert!(!throttle.admit(0).unwrap());

    // SAFETY: the throttle outlives the borrow.
    #[expect(unsafe_code, reason = "the timer is only known by its number")]
    let fd = unsafe { BorrowedFd::borrow_raw(throttle.as_raw_fd()) };
    let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).unwrap();

    assert_eq!(ready, 1);
    assert!(throttle.admit(0).unwrap());
    throttle.clear().unwrap();
    let none = Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&none)).unwrap(), 0);
}

#[test]
fn a_log_line_passes_once_in_a_while_and_tells_what_was_kept_back() {
    let limit = LogLimit::new(Duration::from_secs(5));
    let start = Instant::now();

    assert_eq!(limit.pass(start), Some(0));
    assert_eq!(limit.pass(start + Duration::from_secs(1)), None);
    assert_eq!(limit.pass(start + Duration::from_secs(4)), None);
    assert_eq!(limit.pass(start + Duration::from_secs(5)), Some(2));
}

#[test]
fn what_is_no_rate_is_refused() {
    for text in ["", "0", "M", "1:", ":1", "1:0", "-1", "1.5M", "x", "99999999999T", "1:2:3", "µ"]
    {
        assert_eq!(text.parse::<Rate>(), Err(ParseRateError(text.to_owned())));
    }
    assert_eq!("500".parse(), Ok(rate(500, 500)));
    assert_eq!("10m:64M".parse(), Ok(rate(10 << 20, 64 << 20)));
}

proptest! {
    #[test]
    fn what_is_written_reads_back(per_second in 1u64.., burst in 1u64..) {
        let rate = rate(per_second, burst);
        prop_assert_eq!(rate.to_string().parse(), Ok(rate));
    }

    #[test]
    fn any_text_is_read_or_refused(text in ".{0,30}") {
        let _ = text.parse::<Rate>();
    }

    /// However requests come, no more than burst + rate * time passes, plus the one that may
    /// exceed the burst; and who waits as told gets through.
    #[test]
    fn the_rate_holds_in_the_long_run(
        per_second in 1u64..1 << 40,
        burst in 1u64..1 << 40,
        requests in prop::collection::vec((0u64..1 << 41, 0u64..1 << 33, any::<bool>()), 1..60),
    ) {
        let start = Instant::now();
        let mut now = start;
        let mut limiter = Limiter::new(None, Some(rate(per_second, burst)), start);
        let (mut taken, mut largest) = (0u128, 0u128);
        for (amount, pause, patient) in requests {
            now += Duration::from_nanos(pause);
            let mut result = limiter.take(amount, now);
            if let (Err(wait), true) = (result, patient) {
                now += wait;
                result = limiter.take(amount, now);
                prop_assert_eq!(result, Ok(()));
            }
            if result.is_ok() {
                taken += u128::from(amount);
                largest = largest.max(u128::from(amount));
            }
            let elapsed = (now - start).as_nanos();
            let allowed = u128::from(burst) + u128::from(per_second) * elapsed / 1_000_000_000;
            prop_assert!(taken <= allowed + largest);
        }
    }

    #[test]
    fn no_value_overflows(
        per_second in 1u64.., burst in 1u64..,
        amounts in prop::collection::vec(any::<u64>(), 0..20), pause: u32,
    ) {
        let mut now = Instant::now();
        let mut limiter = Limiter::new(Some(rate(per_second, burst)), Some(rate(burst, per_second)), now);
        for amount in amounts {
            let _ = limiter.take(amount, now);
            now += Duration::from_secs(u64::from(pause));
        }
    }
}
