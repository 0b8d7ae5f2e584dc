//! Which of several images is for a machine (OCI image specification, `image-index.md`).

use anyhow::{Result, bail};

use super::{Descriptor, Platform};

/// The manifest or nested index that fits a machine best: of its architecture, and of its variant where one is asked for.
/// Attestations and other things that run nowhere are passed over.
///
/// # Errors
/// When none fits; the message names those that are there.
pub fn choose<'a>(manifests: &[&'a Descriptor], wanted: &Platform) -> Result<&'a Descriptor> {
    if let [only] = manifests
        && only.platform.is_none()
    {
        return Ok(only);
    }
    let fitting = manifests.iter().copied().filter(|d| {
        d.platform
            .as_ref()
            .is_some_and(|p| p.os == "linux" && p.architecture == wanted.architecture)
    });
    let best = fitting.filter_map(|d| Some((rank(d, wanted)?, d)));
    // The first of equals, as other clients choose.
    if let Some((_, found)) = best.min_by_key(|(rank, _)| *rank) {
        return Ok(found);
    }
    let mut there: Vec<String> = manifests
        .iter()
        .filter_map(|d| d.platform.as_ref())
        .filter(|p| p.os != "unknown")
        .map(Platform::name)
        .collect();
    there.sort();
    there.dedup();
    there.truncate(20);
    bail!(
        "there is no image for {}, but for {}",
        Platform {
            os: "linux".into(),
            ..wanted.clone()
        }
        .name(),
        if there.is_empty() {
            "no known machine".into()
        } else {
            there.join(", ")
        }
    )
}

/// Lower is better; `None` does not run.
fn rank(manifest: &Descriptor, wanted: &Platform) -> Option<u32> {
    let found = manifest.platform.as_ref()?.variant.as_deref();
    let usual = match wanted.architecture.as_str() {
        "arm64" => Some("v8"),
        "arm" => Some("v7"),
        _ => None,
    };
    match (found, wanted.variant.as_deref().or(usual)) {
        (found, wanted) if found == wanted => Some(0),
        (None, _) => Some(1),
        // A newer machine runs what is for an older one; the newest of these is best.
        (Some(found), Some(wanted)) if found < wanted => {
            let number = |v: &str| v.trim_start_matches('v').parse::<u32>().unwrap_or(0);
            Some(2 + number(wanted).saturating_sub(number(found)))
        }
        (Some(_), Some(_)) if wanted.variant.is_some() => None,
        (Some(_), _) => Some(100),
    }
}

impl Platform {
    /// `linux/arm64/v8`.
    pub fn name(&self) -> String {
        let variant = self.variant.iter().map(String::as_str);
        let parts: Vec<&str> = [self.os.as_str(), self.architecture.as_str()]
            .into_iter()
            .chain(variant)
            .collect();
        parts.join("/")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        Platform {
            os: parts.next().unwrap_or_default(),
            architecture: parts.next().unwrap_or_default(),
            variant: parts.next(),
        }
    }

    fn chosen(there: &[&str], wanted: &str) -> Result<String> {
        let manifests: Vec<Descriptor> = there
            .iter()
            .map(|name| Descriptor {
                media_type: String::new(),
                digest: Digest::of(name.as_bytes()),
                size: 1,
                platform: Some(platform(name)),
                annotations: std::collections::BTreeMap::new(),
            })
            .collect();
        let all: Vec<&Descriptor> = manifests.iter().collect();
        let found = choose(&all, &platform(wanted))?;
        Ok(found
            .platform
            .as_ref()
            .map(Platform::name)
            .unwrap_or_default())
    }

    #[test]
    fn best_variant_is_chosen() {
        let there = [
            "unknown/unknown",
            "linux/amd64",
            "linux/arm/v5",
            "linux/arm/v6",
            "linux/arm/v7",
            "linux/arm64/v8",
            "windows/amd64",
        ];
        for (wanted, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/arm/v6", "linux/arm/v6"),
            ("linux/arm64", "linux/arm64/v8"),
            ("linux/arm64/v8", "linux/arm64/v8"),
        ] {
            assert_eq!(chosen(&there, wanted).unwrap(), expected, "{wanted}");
        }
        let old = ["linux/arm/v5", "linux/arm/v6", "linux/amd64"];
        assert_eq!(chosen(&old, "linux/arm/v7").unwrap(), "linux/arm/v6");
        let newer = chosen(&["linux/amd64/v3"], "linux/amd64/v2");
        assert!(newer.is_err());
    }

    #[test]
    fn error_names_what_is_there() {
        let error = chosen(&["linux/arm64/v8", "unknown/unknown"], "linux/ppc64le");
        let text = error.unwrap_err().to_string();
        assert_eq!(
            text,
            "there is no image for linux/ppc64le, but for linux/arm64/v8"
        );
    }
}
