//! The labels that every image gets from whoever builds it, by the names that the peers and their users know
//! (label-schema.org 1.0, OCI image specification `annotations.md`).

/// Labels of an image that is built now: `arch` is Go's name, `headers` are the definition's (`bootstrap`, `from`, …).
pub fn of_build(arch: &str, time_s: i64, headers: &[(&str, &str)]) -> Vec<(String, String)> {
    let schema = |name: &str| format!("org.label-schema.{name}");
    let mut labels = vec![
        (schema("build-arch"), arch.to_owned()),
        (schema("build-date"), Date::at(time_s).spoken()),
        (schema("schema-version"), "1.0".into()),
        (
            schema("usage.capsid.version"),
            env!("CARGO_PKG_VERSION").into(),
        ),
    ];
    for (name, value) in headers {
        let name = format!("usage.singularity.deffile.{}", name.to_lowercase());
        labels.push((schema(&name), (*value).to_owned()));
    }
    let image = |name: &str| format!("org.opencontainers.image.{name}");
    labels.push((image("architecture"), arch.to_owned()));
    labels.push((image("created"), Date::at(time_s).rfc3339()));
    labels
}

/// A time of the Gregorian calendar, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    year: i64,
    /// 1 to 12.
    month: i64,
    day: i64,
    /// 0 is Sunday.
    weekday: i64,
    second_of_day: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

impl Date {
    /// By seconds since 1970 (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
    pub fn at(time_s: i64) -> Date {
        let days = time_s.div_euclid(86_400);
        // Years begin in March, so that the leap day is the last one.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = (shifted_month + 2) % 12 + 1;
        Date {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted_month + 2) / 5 + 1,
            weekday: (days + 4).rem_euclid(7),
            second_of_day: time_s.rem_euclid(86_400),
        }
    }

    fn clock(self) -> String {
        let s = self.second_of_day;
        format!("{:02}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
    }

    /// `Saturday_21_November_2026_19:22:48_UTC`.
    pub fn spoken(self) -> String {
        let name = |names: &[&'static str], at: i64| {
            let at = usize::try_from(at).unwrap_or(0);
            names.get(at).copied().unwrap_or_default()
        };
        format!(
            "{}_{}_{}_{}_{}_UTC",
            name(&DAYS, self.weekday),
            self.day,
            name(&MONTHS, self.month - 1),
            self.year,
            self.clock()
        )
    }

    /// `2026-11-21T19:22:48Z`.
    pub fn rfc3339(self) -> String {
        format!(
            "{:04}-{:02}-{:02}T{}Z",
            self.year,
            self.month,
            self.day,
            self.clock()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (time_s, spoken, rfc3339) in [
            (
                0,
                "Thursday_1_January_1970_00:00:00_UTC",
                "1970-01-01T00:00:00Z",
            ),
            (
                1_795_289_568,
                "Saturday_21_November_2026_19:32:48_UTC",
                "2026-11-21T19:32:48Z",
            ),
            (
                951_782_400,
                "Tuesday_29_February_2000_00:00:00_UTC",
                "2000-02-29T00:00:00Z",
            ),
            (
                4_102_444_799,
                "Thursday_31_December_2099_23:59:59_UTC",
                "2099-12-31T23:59:59Z",
            ),
        ] {
            assert_eq!(Date::at(time_s).spoken(), spoken);
            assert_eq!(Date::at(time_s).rfc3339(), rfc3339);
        }
    }
}
