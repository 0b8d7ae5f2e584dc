//! The options of `build`.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::cmd::transfer::Access;

/// Options of `build`, exactly as typed.
// The hidden options are refused or without effect; they have no help to write.
#[allow(missing_docs)]
#[derive(clap::Args, Debug, Default)]
pub struct BuildArgs {
    /// Make a directory instead of a SIF
    #[arg(short = 's', long, help_heading = "Result")]
    pub sandbox: bool,
    /// Build upon the directory that is there: no bootstrap
    #[arg(short = 'u', long, help_heading = "Result")]
    pub update: bool,
    /// Replace an existing image, and labels of the base
    #[arg(short = 'F', long, help_heading = "Result")]
    pub force: bool,
    /// Compressor of the SIF: gzip, zstd, xz or lz4, with a level as in zstd:19 [default: gzip:9]
    #[arg(long, value_name = "NAME[:LEVEL]", help_heading = "Result")]
    pub compression: Option<String>,
    /// Bytes of a block: 4K to 1M [default: 128K]
    #[arg(long, value_name = "SIZE", help_heading = "Result")]
    pub block_size: Option<String>,
    /// Options of mksquashfs: -comp, -Xcompression-level, -b, -no-fragments, -processors
    #[arg(
        long,
        value_name = "ARGS",
        allow_hyphen_values = true,
        help_heading = "Result"
    )]
    pub mksquashfs_args: Option<String>,
    /// Equal input gives equal bytes: no time in the image is later than SOURCE_DATE_EPOCH, else 1970
    #[arg(long, help_heading = "Result")]
    pub reproducible: bool,
    /// Give the owner read and write permission on everything
    #[arg(long, help_heading = "Result")]
    pub fix_perms: bool,

    /// Run only these sections: setup, post, files, environment, test, labels, none
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        help_heading = "Definition"
    )]
    pub section: Vec<String>,
    /// Do not run %test
    #[arg(short = 'T', long, help_heading = "Definition")]
    pub notest: bool,
    /// The definition is JSON
    #[arg(long, help_heading = "Definition")]
    pub json: bool,
    /// Value of {{ NAME }} in the definition: NAME=VALUE
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Definition")]
    pub build_arg: Vec<String>,
    /// File with NAME=VALUE lines
    #[arg(long, value_name = "FILE", help_heading = "Definition")]
    pub build_arg_file: Vec<PathBuf>,
    /// An unused --build-arg is no error
    #[arg(long, help_heading = "Definition")]
    pub warn_unused_build_args: bool,

    /// Bind a host path for %post and %test: src[:dst[:opt[,opt]]]
    #[arg(short = 'B', long, value_name = "SPEC", help_heading = "Sections")]
    pub bind: Vec<OsString>,
    /// Mount in the form type=bind,source=SRC,destination=DST[,ro]
    #[arg(long, value_name = "SPEC", help_heading = "Sections")]
    pub mount: Vec<OsString>,
    /// NVIDIA's libraries and devices for %post and %test
    #[arg(long, help_heading = "Sections")]
    pub nv: bool,
    /// AMD's libraries and devices for %post and %test
    #[arg(long, help_heading = "Sections")]
    pub rocm: bool,
    /// %test may write to memory
    #[arg(long, help_heading = "Sections")]
    pub writable_tmpfs: bool,
    /// Keep the owners of an image that is unpacked to a directory (definitions always build as root)
    #[arg(short = 'f', long, help_heading = "Sections")]
    pub fakeroot: bool,
    /// Emulate ownership although there are subordinate ids
    #[arg(long, help_heading = "Sections")]
    pub ignore_subuid: bool,

    /// Architecture of the image, as in amd64 or arm64
    #[arg(long = "arch", value_name = "ARCH", help_heading = "Sources")]
    pub build_arch: Option<String>,
    /// Variant of the architecture, as in v7
    #[arg(
        long = "arch-variant",
        value_name = "VARIANT",
        help_heading = "Sources"
    )]
    pub build_arch_variant: Option<String>,
    #[command(flatten)]
    pub access: Access,
    /// Library to fetch from: an address
    #[arg(long, value_name = "URL", help_heading = "Sources")]
    pub library: Option<String>,
    /// Keep no steps, and use none
    #[arg(long, visible_alias = "no-cache", help_heading = "Sources")]
    pub disable_cache: bool,
    /// Directory for temporary files [default: $TMPDIR, else /tmp]
    #[arg(long, value_name = "DIR", help_heading = "Sources")]
    pub tmpdir: Option<PathBuf>,
    /// Leave the temporary files of a failed build
    #[arg(long, help_heading = "Sources")]
    pub no_cleanup: bool,

    #[arg(long, hide = true)]
    pub userns: bool,
    #[arg(long, hide = true)]
    pub ignore_fakeroot_command: bool,
    #[arg(long, hide = true)]
    pub ignore_userns: bool,
    #[arg(long, hide = true)]
    pub ignore_proot: bool,
    #[arg(short = 'e', long, hide = true)]
    pub encrypt: bool,
    #[arg(long, hide = true)]
    pub passphrase: bool,
    #[arg(long, hide = true)]
    pub pem_path: Option<PathBuf>,
    #[arg(long, hide = true)]
    pub nvccli: bool,
    #[arg(long, hide = true)]
    pub data: bool,
    #[arg(long, hide = true)]
    pub compat32: bool,
    #[arg(long, hide = true)]
    pub buildkit_host: Option<String>,
    #[arg(short = 'r', long, hide = true)]
    pub remote: bool,
    #[arg(short = 'd', long, hide = true)]
    pub detached: bool,
    #[arg(long, hide = true)]
    pub builder: Option<String>,
    #[arg(long, hide = true)]
    pub oci: bool,
    #[arg(long, hide = true)]
    pub no_oci: bool,
    #[arg(long, hide = true)]
    pub keep_layers: bool,
    #[arg(long, hide = true)]
    pub no_setgroups: bool,
}

impl BuildArgs {
    /// An option that cannot be honoured, with the reason.
    pub(super) fn refusal(&self) -> Option<(&'static str, &'static str)> {
        let encryption = "images cannot be encrypted by this version";
        let remote = "there is no remote build service: leave it out to build here";
        let oci = "OCI-SIF images cannot be made: leave it out for a SIF";
        let cases = [
            (self.encrypt, "--encrypt", encryption),
            (self.passphrase, "--passphrase", encryption),
            (self.pem_path.is_some(), "--pem-path", encryption),
            (self.nvccli, "--nvccli", "use --nv"),
            (
                self.data,
                "--data",
                "build a SIF, and bind it with image-src",
            ),
            (
                self.compat32,
                "--compat32",
                "it adds 32-bit libraries of a GPU, and those are not looked for: leave it out",
            ),
            (
                self.buildkit_host.is_some(),
                "--buildkit-host",
                "build with podman or buildah, and use an oci-archive",
            ),
            (self.remote, "--remote", remote),
            (self.detached, "--detached", remote),
            (self.builder.is_some(), "--builder", remote),
            (self.oci, "--oci", oci),
            (self.keep_layers, "--keep-layers", oci),
        ];
        cases
            .into_iter()
            .find(|(given, ..)| *given)
            .map(|(_, option, why)| (option, why))
    }
}
